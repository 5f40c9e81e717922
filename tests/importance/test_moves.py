"""Whether a move is worth it: nothing moves at rest, a shift moves, a price holds back, a cap caps."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import foveate as fv
from foveate.errors import BudgetError
from foveate.importance.chains import chain_of, rooms_of
from foveate.importance.moves import Caution, Held, Ratios, chosen, moved, propose
from foveate.importance.rolling import rescaled
from foveate.precision.frontiers import Frontier
from foveate.precision.profiles import Profile
from frontiers import random_profile
from tiny import generator

PROFILE = random_profile(3)
ONES = {s.name: torch.ones(s.tiles, dtype=torch.float64) for s in PROFILE.weight_sites()}


def _make(profile: Profile, bits: float = 3.5) -> tuple[Held, Callable[[Ratios], Frontier]]:
    rooms = rooms_of([fv.allocate(profile, fv.Budget(bits=bits))])

    def make(by: Ratios) -> Frontier:
        return chain_of(rescaled(profile, by), rooms, fv.Constraints())

    return Held(chain=make(ONES), ratios=ONES), make


def _noise(scale: float, seed: int) -> dict[str, torch.Tensor]:
    g = generator(seed)
    return {name: (scale * torch.randn(len(one), generator=g)).double().exp() for name, one in ONES.items()}


def test_nothing_moves_at_rest() -> None:
    held, make = _make(PROFILE)
    for seed in range(20):
        assert propose(PROFILE, held, _noise(0.05, seed), make, 0, Caution()) is None


def test_a_shift_moves_and_is_settled_by_one_move() -> None:
    held, make = _make(PROFILE)
    now = _noise(2.0, 1)
    found = propose(PROFILE, held, now, make, 0, Caution())
    assert found is not None
    assert found.after < 0.98 * found.before
    assert found.moved == moved(held.chain[0], found.held.chain[0])
    assert found.moved.tiles > 0
    assert propose(PROFILE, found.held, now, make, 0, Caution()) is None


def test_a_price_on_bytes_holds_back_what_gains_less() -> None:
    held, make = _make(PROFILE)
    now = _noise(2.0, 1)
    free = propose(PROFILE, held, now, make, 0, Caution())
    assert free is not None
    price = (free.before - free.after) / (free.moved.bytes / 2**20)
    assert propose(PROFILE, held, now, make, 0, Caution(price=1.01 * price)) is None
    assert propose(PROFILE, held, now, make, 0, Caution(price=0.5 * price)) is not None


@pytest.mark.parametrize("most", [3, 8, 15])
def test_a_cap_on_moves_is_kept_and_moves_go_on(most: int) -> None:
    held, make = _make(PROFILE)
    now = _noise(2.0, 2)
    whole = propose(PROFILE, held, now, make, 0, Caution(margin=0.0))
    assert whole is not None
    assert whole.moved.tiles > 15
    first = propose(PROFILE, held, now, make, 0, Caution(margin=0.0, most_tiles=most))
    if first is None:
        return  # no move of so few tiles gains anything
    assert 0 < first.moved.tiles <= most
    assert first.before > first.after >= whole.after


def test_with_room_for_some_tiles_part_of_the_gain_is_taken() -> None:
    held, make = _make(PROFILE)
    found = propose(PROFILE, held, _noise(2.0, 2), make, 0, Caution(margin=0.0, most_tiles=15))
    assert found is not None


def test_a_move_is_counted_in_tiles_and_bytes() -> None:
    four, three = PROFILE.uniform(4), PROFILE.uniform(3)
    found = moved(four, three)
    assert found.tiles == sum(s.tiles for s in PROFILE.weight_sites())
    assert found.bytes == four.bytes_resident - three.bytes_resident
    assert moved(four, four).tiles == moved(four, four).bytes == 0


def test_the_shadow_decides() -> None:
    assert chosen({"held": 0.02, "static": 0.03, "online": 0.015}, 0.02) == "online"
    assert chosen({"held": 0.02, "static": 0.03, "online": 0.025}, 0.02) == "held"
    assert chosen({"held": 0.02, "static": 0.0199}, 0.02) == "held"
    assert chosen({"held": 0.02, "static": 0.01}, 0.02) == "static"
    assert chosen({"held": 0.02, "static": 0.01, "online": 0.015}, 0.02) == "static"
    assert chosen({"held": math.inf, "static": math.inf, "online": math.inf}, 0.02) == "held"


def test_errors_name_the_value_and_the_rule() -> None:
    with pytest.raises(BudgetError, match=r"margin \(=1\) is not from 0 to below 1"):
        Caution(margin=1)
    with pytest.raises(BudgetError, match=r"price \(=-1\)"):
        Caution(price=-1)
    with pytest.raises(BudgetError, match=r"most_tiles \(=0\)"):
        Caution(most_tiles=0)
