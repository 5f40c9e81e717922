"""Every differentiable operator of torch: exact where that is promised, no crash and finite where bits are lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import Tensor

pytest.importorskip("expecttest", reason="torch's database of operators needs it")

from op_sweep import Case, cases, finite, inside, names, odd_cases, same

LEVEL_WEIGHTS = 4
#: What torch itself computes differently from run to run with the same seed. None now.
NOT_DETERMINISTIC: frozenset[str] = frozenset()

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the database is full of deprecated calls
    pytest.mark.filterwarnings("error:Casting complex values to real"),
]


def _checked(drawn: Iterator[Case], refused: list[str]) -> Iterator[tuple[Case, list[Tensor | None]]]:
    """The cases that plain autograd computes, with their gradients."""
    for case in drawn:
        try:
            wanted = case.gradients()
        except Exception as error:  # a sample that torch itself refuses in this form, for reasons of any kind
            refused.append(f"{case.name}: {error}")
            continue
        if case.name not in NOT_DETERMINISTIC:
            yield case, wanted


@pytest.mark.parametrize("share", range(LEVEL_WEIGHTS))
def test_every_operator(share: int) -> None:
    refused: list[str] = []
    wrong: list[str] = []
    count = 0
    for case, wanted in _checked(cases(share, LEVEL_WEIGHTS), refused):
        count += 1
        if not same(wanted, inside(case, levels=32)):
            wrong.append(f"{case.name}: other gradients at 32 bits")
        for settings in ({"levels": 4}, {"error": 0.1, "default": 8}):
            found = inside(case, **settings)
            if finite(wanted) and not finite(found):
                wrong.append(f"{case.name}: {settings}: not finite")
    assert not wrong
    assert count > 200
    assert len(refused) < 12, refused


@pytest.mark.parametrize("share", range(LEVEL_WEIGHTS))
def test_every_operator_with_odd_inputs(share: int) -> None:
    refused: list[str] = []
    wrong: list[str] = []
    count = 0
    for case, wanted in _checked(odd_cases(share, LEVEL_WEIGHTS), refused):
        count += 1
        change = case.change.__name__
        if not same(wanted, inside(case, levels=32)):
            wrong.append(f"{case.name}{change}: other gradients at 32 bits")
        if change in ("_not_finite", "_same"):
            found = inside(case, levels=4)
            if change == "_same" and not same(wanted, found):
                wrong.append(f"{case.name}: float64 lost bits")
    assert not wrong
    assert count > 500


def test_no_operator_is_left_out() -> None:
    assert len(names()) > 500
    assert not NOT_DETERMINISTIC & names()
