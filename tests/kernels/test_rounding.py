"""`error_feedback` and `coordinate_descent`: on every instruction set the codes are those of the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.kernels.rounding import reference as reference
from foveate.rounding import round_weight
from kernels.cases import forced, isas
from tiny import generator

ISAS = isas()
LEVEL_WEIGHTS = (1 / 16, 1 / 4, 1.0, 1.0, 4.0)
coordinate_descent, error_feedback = torch.ops.foveate.coordinate_descent, torch.ops.foveate.error_feedback


def _covariance(size: int, seed: int) -> Tensor:
    x = torch.randn(4 * size + 8, size, generator=generator(seed)) + 0.5
    return x.t() @ x / len(x) + 0.1 * torch.eye(size)


def _factor(metric: Tensor) -> Tensor:
    """U_jk / U_jj of the inverse."""
    upper = torch.linalg.cholesky(torch.linalg.inv(metric.double()), upper=True)
    return (upper / upper.diagonal()[:, None]).float().contiguous()


class Call(NamedTuple):
    """Arguments in the order of the schema, up to the level weights."""

    codes: Tensor
    w: Tensor
    covariance: Tensor
    gradients: Tensor | None
    scale: Tensor
    offset: Tensor
    gain: Tensor
    group_of: Tensor
    reach: int = 0

    def descend(self, sweeps: int = 1) -> Tensor:
        """The codes that the op in use changes a copy of these to."""
        codes = self.codes.clone()
        coordinate_descent(codes, *self[1:-1], LEVEL_WEIGHTS, sweeps, 0.0, self.reach)
        return codes

    def feed(self, by: Callable[..., None]) -> Tensor:
        """The codes that feedback gives, by the op or the reference."""
        codes = self.codes.clone()
        rows = None if self.gradients is None else torch.stack([_factor(g).t().tril(-1) for g in self.gradients])
        by(codes, self.w, _factor(self.covariance), rows, *self[4:-1], LEVEL_WEIGHTS, self.reach)
        return codes

    def expected(self, sweeps: int = 1) -> Tensor:
        """What `descend` should give, by the reference."""
        codes = self.codes.clone()
        reference.coordinate_descent(codes, *self[1:-1], LEVEL_WEIGHTS, sweeps, 0.0, self.reach)
        return codes

    def objective(self, codes: Tensor) -> float:
        """J in float64, the metrics of blocks cut to the rows that exist."""
        rows = len(self.w)
        table = reference.code_values(self.gain, self.reach)
        values = table[:, codes[0].long(), codes[1].long(), torch.arange(rows)[:, None]]
        step, middle = (t[:, self.group_of] for t in (self.scale, self.offset))
        error = (middle + step * values - self.w).double()
        pulled = error @ self.covariance.double()
        if self.gradients is not None:
            pulled = torch.block_diag(*self.gradients.double())[:rows, :rows] @ pulled
        return float((torch.tensor(LEVEL_WEIGHTS, dtype=torch.float64) * (error * pulled).sum((1, 2))).sum())


def _call(rows: int, columns: int, together: int | None, group: int, seed: int) -> Call:
    w = torch.randn(rows, columns, generator=generator(seed))
    nearest = round_weight(w, group=group)
    gradients = None
    if together is not None:
        gradients = torch.stack([_covariance(together, seed + 1 + b) for b in range(-(-rows // together))])
    gain = nearest.gain.float().expand(2, rows).contiguous()
    codes = torch.stack([nearest.anchor, nearest.residual])
    group_of = torch.randperm(columns, generator=generator(seed)) // group
    return Call(codes, w, _covariance(columns, seed), gradients, nearest.scale, nearest.offset, gain, group_of)


@pytest.mark.skipif(not ISAS, reason="no compiled kernels: no C++ compiler was found")
@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 140),
    together=st.sampled_from((None, 1, 7, 16, 40)),
    group=st.sampled_from((32, 64, 128)),
    reach=st.sampled_from((0, 0, 1, 2, 3)),
    seed=st.integers(0, 1000),
)
def test_compiled_loops_choose_the_codes_of_the_reference(
    rows: int, columns: int, together: int | None, group: int, reach: int, seed: int
) -> None:
    call = _call(rows, columns if together is None else min(columns, 40), together, group, seed)
    call = call._replace(reach=reach)
    wanted = [call.expected(), call.feed(reference.error_feedback)]
    found = []
    for isa in ISAS:
        with forced(isa):
            found.append([call.descend(), call.feed(error_feedback)])
    for here, want in enumerate(wanted):
        codes = found[0][here]
        assert all(torch.equal(each[here], codes) for each in found)
        # sums in another order may tip a code, and then those that follow; the outcome is as good
        assert call.objective(codes) == pytest.approx(call.objective(want), rel=5e-3)
        assert float((want == codes).float().mean()) > 0.95


def test_the_number_of_threads_does_not_change_the_codes() -> None:
    call, found = _call(200, 150, 33, 64, 5), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(call.descend(2))
    # a product of matrices may be added in another order
    assert all(float((codes == found[0]).float().mean()) > 0.99 for codes in found)


@pytest.mark.parametrize("together", [None, 12])
def test_every_sweep_lowers_the_objective(together: int | None) -> None:
    call = _call(30, 60, together, 32, 3)
    objectives = [call.objective(call.descend(sweeps)) for sweeps in range(5)]
    assert objectives == sorted(objectives, reverse=True)
    assert objectives[-1] < 0.95 * objectives[0]


@pytest.mark.parametrize("together", [None, 12])
def test_sweeps_end_where_they_do_not_pay(together: int | None) -> None:
    call = _call(18, 33, together, 32, 3)

    def swept(by: Callable[..., Tensor], least_gain: float) -> tuple[Tensor, list[int]]:
        codes = call.codes.clone()
        return codes, by(codes, *call[1:-1], LEVEL_WEIGHTS, 8, least_gain).tolist()

    for by in (coordinate_descent, reference.coordinate_descent):
        codes, made = swept(by, 0.25)
        assert all(1 <= count < 8 for count in made)
        assert len(made) == (1 if together is None else 2)
        # no block goes on once a sweep has taken less than this part off
        assert swept(by, 1.0)[1] == [1] * len(made)
        assert swept(by, 0.0)[1] == [8] * len(made)
        if together is None:
            assert torch.equal(codes, call.descend(made[0]) if by is coordinate_descent else call.expected(made[0]))
    assert swept(coordinate_descent, 0.25)[1] == swept(reference.coordinate_descent, 0.25)[1]


@pytest.mark.parametrize("together", [None, 12])
def test_feedback_is_a_better_start(together: int | None) -> None:
    call = _call(30, 60, together, 32, 3)
    assert call.objective(call.feed(error_feedback)) < 0.97 * call.objective(call.codes)


def test_codes_of_a_group_whose_scale_is_zero_stay() -> None:
    call = _call(10, 70, 5, 32, 1)
    call.scale[:, 1] = 0
    flat = call.group_of == 1
    for codes in (call.descend(), call.expected(), call.feed(error_feedback), call.feed(reference.error_feedback)):
        assert torch.equal(codes[:, :, flat], call.codes[:, :, flat])
        assert not torch.equal(codes[:, :, ~flat], call.codes[:, :, ~flat])


@pytest.mark.skipif(not ISAS, reason="the reference does not check")
def test_arguments_that_do_not_fit_are_refused() -> None:
    call = _call(10, 70, 5, 32, 1)
    wrong = (
        call._replace(codes=torch.zeros(2, 10, 69, dtype=torch.uint8)),
        call._replace(covariance=torch.eye(69)),
        call._replace(offset=torch.ones(10, 2)),
        call._replace(w=call.w.double()),
        call._replace(w=call.w.t().contiguous().t()),
    )
    for each in wrong:
        with pytest.raises(RuntimeError, match="not contiguous"):
            each.descend()
    with pytest.raises(RuntimeError, match="outside the 3 groups"):
        call._replace(group_of=torch.full((70,), 3)).descend()
    with pytest.raises(RuntimeError, match="not one per level"):
        coordinate_descent(*call[:-1], LEVEL_WEIGHTS[:4], 1)
    with pytest.raises(RuntimeError, match="not one of 0, 1, 2"):
        call._replace(reach=4).descend()


def test_both_ops_pass_opcheck() -> None:
    call = _call(6, 40, None, 32, 2)
    torch.library.opcheck(coordinate_descent.default, (*call[:-1], list(LEVEL_WEIGHTS), 1))
    torch.library.opcheck(coordinate_descent.default, (*_call(6, 40, 4, 32, 2)[:-1], list(LEVEL_WEIGHTS), 2, 0.1, 1))
    torch.library.opcheck(error_feedback.default, (*call[:-1], list(LEVEL_WEIGHTS)))


def test_the_reference_compares_codes_of_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, at_once = reference.LONE_ROWS + 5, []
    values = reference.code_values

    def watched(gain_2n: Tensor, reach: int) -> Tensor:
        at_once.append(gain_2n.shape[1])
        return values(gain_2n, reach)

    monkeypatch.setattr(reference, "code_values", watched)
    w = torch.randn(rows, 2, generator=generator(0))
    codes = torch.zeros(2, rows, 2, dtype=torch.uint8)
    grid = torch.ones(rows, 1), torch.zeros(rows, 1), torch.ones(2, rows), torch.zeros(2, dtype=torch.int64)
    reference.error_feedback(codes, w, torch.eye(2), None, *grid, LEVEL_WEIGHTS)
    assert at_once == [reference.LONE_ROWS, 5]
    last = torch.zeros(2, 5, 2, dtype=torch.uint8)
    reference.error_feedback(
        last, w[-5:], torch.eye(2), None, *(t[-5:] for t in grid[:2]), torch.ones(2, 5), grid[3], LEVEL_WEIGHTS
    )
    assert torch.equal(codes[:, -5:], last)
