"""Quantizing by a schedule of passes: the same result as in one, and the fastest schedule that fits into memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate as fv
from foveate.calibrate.passes import calibration
from foveate.calibrate.schedule import Schedule, WeightCost, cut, freed_after, make_schedule
from foveate.collect.dry_run import dry_run
from foveate.collect.kinds import find_weights
from foveate.collect.objectives import Logits
from foveate.errors import DataError
from tiny import TRANSFORMER, llama, mlp, rows, tokens


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertModel(BertConfig(**sizes, intermediate_size=40, max_position_embeddings=32)).eval()


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**TRANSFORMER, num_local_experts=3, num_experts_per_tok=2)).eval()


class _Residual(nn.Module):
    """Residual blocks, one of them used twice, and a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, stride=2)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1))
            for _ in range(3)
        )
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        first = h = self.stem(x)
        for i in (0, 1, 2, 1):
            h = h + torch.tanh(self.blocks[i](h))
        return self.head((h + first).mean((-2, -1)))


MODELS: dict[str, tuple[Callable[[], nn.Module], list[Any], dict[str, Any]]] = {
    "llama": (llama, tokens(6, batches=3), {}),
    "bert": (_bert, [{**b, "attention_mask": torch.ones_like(b["input_ids"])} for b in tokens()], {}),
    "tied": (_gpt2, tokens(), {}),
    "experts": (_mixtral, tokens(), {}),
    "convolutions": (_Residual, list(torch.randn(12, 3, 9, 11).split(4)), {"objective": fv.Logits()}),
    "mlp": (mlp, rows(), {"objective": fv.Logits()}),
}


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Schedule]]:
    """Make every calibration follow a given schedule; the schedules that were made are listed."""

    def force(parts: int, *, replay: bool, free_early: bool) -> list[Schedule]:
        made: list[Schedule] = []

        def planned(costs: list[WeightCost], *_: int) -> Schedule:
            made.append(Schedule(replay, cut(costs, parts), free_early, 0))
            return made[-1]

        monkeypatch.setattr(calibration, "make_schedule", planned)
        return made

    return force


@cache
def _in_one_pass(what: str) -> tuple[fv.Profile, dict[str, Tensor]]:
    """The profile of a model and its state, calibrated as it is where memory is not short."""
    make, batches, keywords = MODELS[what]
    model = make()
    return fv.quantize(model, batches, progress=False, **keywords), model.state_dict()


@pytest.mark.parametrize("what", MODELS)
@pytest.mark.parametrize(
    ("parts", "replay", "free_early"), [(1, True, False), (1, False, True), (3, False, True), (100, True, True)]
)
def test_the_result_is_that_of_one_pass(
    what: str, parts: int, replay: bool, free_early: bool, forced: Callable[..., list[Schedule]]
) -> None:
    make, batches, keywords = MODELS[what]
    expected, plain = _in_one_pass(what)
    made = forced(parts, replay=replay, free_early=free_early)
    streamed = make()
    profile = fv.quantize(streamed, (b for b in batches), progress=False, **keywords)
    assert len(made[0].parts) >= min(parts, 2)
    assert profile.sites == expected.sites
    assert profile.notes == expected.notes
    assert profile.samples == expected.samples
    for name, table in expected.losses.items():
        assert torch.allclose(profile.losses[name], table, rtol=1e-4, atol=1e-9), name
    state = streamed.state_dict()
    for name, t in plain.items():
        if t.dtype == torch.uint8:  # codes: an input that differs in its last place may move one between equals
            assert float((state[name] != t).float().mean()) < 1e-3, name
        else:
            assert torch.allclose(state[name], t, rtol=1e-2, atol=1e-5), name
    fv.apply(streamed, profile.uniform(4))


class _Counts(nn.Module):
    """A layer that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.layer(x)
        return y


def test_further_passes_go_only_as_far_as_they_must(forced: Callable[..., list[Schedule]]) -> None:
    forced(4, replay=False, free_early=True)
    model = nn.Sequential(*(_Counts() for _ in range(4)))
    fv.quantize(model, [torch.randn(9, 8), torch.randn(9, 8)], objective=fv.Logits(), progress=False)
    # the dry run, two batches of the first pass, and two for each further part that lies at or behind a layer
    # (in the end one on planes, and two at each of five levels)
    assert [m.calls - 1 - 2 * 5 for m in model] == [1 + 2 * 4, 1 + 2 * 3, 1 + 2 * 2, 1 + 2 * 1]


def test_float_weights_behind_a_pass_are_freed(forced: Callable[..., list[Schedule]]) -> None:
    forced(4, replay=False, free_early=True)
    model = nn.Sequential(*(_Counts() for _ in range(4)))
    floats = []

    def watch(module: nn.Module, args: Any) -> None:
        if isinstance(model[0].layer, nn.Linear):
            floats.append(sum(m.layer.weight.device.type != "meta" for m in model))  # type: ignore[union-attr]

    handle = model.register_forward_pre_hook(watch)
    fv.quantize(model, [torch.randn(9, 8)], objective=fv.Logits(), progress=False)
    handle.remove()
    assert floats == [4, 4, 3, 2, 1]


def test_blocks_keep_less_and_are_found_by_size() -> None:
    model = llama(num_hidden_layers=6).requires_grad_(False)
    model.config.use_cache = False
    seen = dry_run(model, tokens(8, 40, 1)[0], find_weights(model), Logits())
    names, least = seen.smallest_cut()
    assert least < 0.5 * seen.kept
    assert {f"model.layers.{i}" for i in range(6)} <= {".".join(n.split(".")[:3]) for n in names}
    everything, whole = seen.blocks_within(seen.kept)
    assert whole <= seen.kept + seen.uses["model"].input_bytes
    assert all("." not in n for n in everything)


def test_what_the_dry_run_counts_is_what_backward_keeps() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 4)).requires_grad_(False)
    seen = dry_run(model, torch.randn(10, 8), find_weights(model), None)
    # inputs of both layers, which calibration copies, and what the sigmoid keeps
    assert seen.kept == 4 * 10 * (8 + 16 + 16)
    assert seen.rows == {"0": 10, "2": 10}
    assert seen.calls == ("0", "2")


class _Grows(nn.Module):
    """Its output depends on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.calls = nn.Linear(8, 8), nn.Linear(8, 8), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.calls * torch.sigmoid(self.second(torch.sigmoid(self.first(x))))


def test_a_block_that_does_not_repeat_itself_is_an_error(forced: Callable[..., list[Schedule]]) -> None:
    forced(1, replay=True, free_early=False)
    model = nn.Sequential(_Grows(), _Grows(), nn.Linear(8, 3))
    with pytest.raises(DataError, match=r"\d does not compute the same when it is run twice .* more memory"):
        fv.quantize(model, [torch.randn(50, 8)], objective=fv.Logits(), progress=False)
    assert "forward" not in model[0].__dict__


class _InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.second(torch.sigmoid(self.first(x))))
        x.add_(y)
        return x


def test_a_block_that_changes_its_input_is_not_run_twice(forced: Callable[..., list[Schedule]]) -> None:
    x = torch.randn(50, 8)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), _InPlace(), nn.Linear(8, 3))
    expected = fv.quantize(copy.deepcopy(model), [x.clone()], objective=fv.Logits(), progress=False)
    forced(1, replay=True, free_early=False)
    profile = fv.quantize(model, [x.clone()], objective=fv.Logits(), progress=False)
    assert all(torch.allclose(t, expected.losses[n], rtol=1e-4) for n, t in profile.losses.items())


def test_resume_when_there_are_several_passes(tmp_path: Path, forced: Callable[..., list[Schedule]]) -> None:
    batches = rows(60, 70, 6)
    expected = fv.quantize(mlp(), batches, progress=False)
    forced(3, replay=True, free_early=True)

    def interrupted() -> Iterator[Tensor]:
        yield from batches[:5]
        raise KeyboardInterrupt

    file = tmp_path / "statistics"
    model = mlp()
    with pytest.raises(KeyboardInterrupt):
        fv.quantize(model, interrupted(), resume=file, progress=False)
    forced(2, replay=False, free_early=True)
    profile = fv.quantize(model, batches, resume=file, progress=False)
    assert all(torch.allclose(t, expected.losses[n], rtol=1e-4) for n, t in profile.losses.items())
    assert not file.exists()


def test_the_statistics_of_the_first_batches_are_kept_too(tmp_path: Path) -> None:
    def interrupted() -> Iterator[Tensor]:
        yield from rows(30, 70, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fv.quantize(mlp(), interrupted(), resume=tmp_path / "statistics", progress=False)
    assert (tmp_path / "statistics").exists()


def _layer(first: int, *, large: int = 100 << 20, gradients: bool = False) -> WeightCost:
    return WeightCost(1024, 1024, False, 4 << 20, large, gradients, first, first)


def test_the_fastest_schedule_that_fits() -> None:
    costs = [_layer(i) for i in range(8)]
    kept, replayed, forward = 2 << 30, 100 << 20, 10 << 20
    roomy = make_schedule(costs, kept, replayed, forward, 4 << 30)
    assert (roomy.replay, len(roomy.parts), roomy.free_early) == (False, 1, False)
    tighter = make_schedule(costs, kept, replayed, forward, 1200 << 20)
    assert (tighter.replay, len(tighter.parts)) == (True, 1)
    tight = make_schedule(costs, kept, replayed, forward, 620 << 20)
    assert tight.replay
    assert len(tight.parts) > 1
    assert tight.peak <= 620 << 20
    # nothing fits: the one that takes least
    least = make_schedule(costs, kept, replayed, forward, 0)
    assert len(least.parts) == 8
    assert all(p >= least.peak for p in (roomy.peak, tighter.peak, tight.peak))


def test_memory_is_left_where_that_takes_little_time() -> None:
    costs = [_layer(i) for i in range(8)]
    kept, replayed, forward, room = 2 << 30, 100 << 20, 10 << 20, 4 << 30

    def chosen(comfort: int) -> tuple[bool, int, bool]:
        found = make_schedule(costs, kept, replayed, forward, room, comfort)
        return found.replay, len(found.parts), found.free_early

    assert chosen(4 << 30) == (False, 1, False)
    assert chosen(1200 << 20) == (True, 1, False)
    # blocks that run twice and one more pass are worth it, and two more passes are not; float weights are kept
    assert chosen(0) == (True, 2, False)
    assert make_schedule(costs, kept, replayed, forward, 620 << 20, 0).peak <= 620 << 20


def test_parts_go_from_the_end_to_the_beginning() -> None:
    costs = [_layer(i) for i in (3, 0, 2, 1)]
    assert cut(costs, 4) == ((0,), (2,), (3,), (1,))
    assert cut(costs, 2) == ((0, 2), (3, 1))
    assert cut(costs, 1) == ((0, 2, 3, 1),)
    parts = cut(costs, 4)
    assert freed_after(costs, parts, 2) == [0, 2]
    # tied: used at the beginning too
    costs[0] = WeightCost(8, 8, False, 256, 256, False, -1, 3)
    assert freed_after(costs, parts, 2) == [2]
    costs[1] = _layer(0, gradients=True)
    assert freed_after(costs, parts, 2) == []


def test_rounding_counts_what_is_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    # the damped covariance and a factor in single precision, three factors in double
    wide = WeightCost(64, 8192, False, 4 * 64 * 8192, 4 * 8192**2, False, 0, 0)
    assert wide.rounding_bytes >= (4 + 3 * 8 + 4) * 8192**2
    # for the rows of two threads: the wanted errors of five streams, and the product that is subtracted
    tall = WeightCost(65536, 1024, False, 4 << 26, 4 << 20, False, 0, 0)
    nearest = WeightCost(65536, 1024, False, 4 << 26, 0, False, 0, 0)
    assert tall.rounding_bytes >= 2 * 20 * 1024 * 1024 + 6 * 65536 * 1024
    assert nearest.rounding_bytes < tall.rounding_bytes
