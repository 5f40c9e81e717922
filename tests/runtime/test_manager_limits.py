from __future__ import annotations

import math

import pytest

from foveate.errors import BudgetError
from foveate.runtime.limits import Limits


def test_units_are_read() -> None:
    limits = Limits(memory="6GiB", power="45W", queue_wait="200ms", latency="1.5s", cpu_pressure="20%", quality=0.02)
    assert limits.given() == {
        "memory": 6 * 2**30,
        "power": 45.0,
        "queue_wait": pytest.approx(0.2),
        "latency": 1.5,
        "cpu_pressure": pytest.approx(0.2),
    }
    assert limits.allowed_kl == 0.02
    assert Limits(power="1.5kW").given() == {"power": 1500.0}
    assert Limits(latency=0.05).given() == {"latency": 0.05}
    assert Limits(latency="2").given() == {"latency": 2.0}
    assert math.isinf(Limits(latency=1).allowed_kl)


def test_a_budget_of_quality_alone_is_a_limit() -> None:
    assert Limits(quality=0.1).given() == {}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "there is no limit"),
        ({"power": "45V"}, r"limit power \(='45V'\) is not a number like 0.2mW"),
        ({"queue_wait": "-1s"}, "queue_wait"),
        ({"queue_wait": 0}, r"limit queue_wait \(=0.0\) is not a positive finite number"),
        ({"latency": math.nan}, "latency"),
        ({"latency": "1e999s"}, "latency"),
        ({"cpu_pressure": 1.5}, r"cpu_pressure \(=1.5\) is a share of time"),
        ({"cpu_pressure": "150%"}, "share of time"),
        ({"quality": -0.1}, "quality"),
        ({"memory": True}, "memory"),
        ({"memory": "much"}, "size"),
        ({"latency": True}, "latency"),
        ({"power": "45 W W"}, "power"),
    ],
)
def test_what_is_no_limit_is_refused(given: dict[str, object], says: str) -> None:
    with pytest.raises(BudgetError, match=says):
        Limits(**given)  # type: ignore[arg-type]


def test_a_command_line_is_read() -> None:
    assert Limits.parse("queue_wait=200ms, power=45W") == Limits(queue_wait=0.2, power=45)
    assert Limits.parse("memory=6GiB") == Limits(memory=6 * 2**30)
    assert Limits.parse("memory=1234567") == Limits(memory=1234567)


@pytest.mark.parametrize("text", ["", "queue_wait", "speed=3", "power=1W,power=2W", "given=1"])
def test_a_command_line_that_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(BudgetError):
        Limits.parse(text)
