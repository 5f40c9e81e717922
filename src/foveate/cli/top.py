"""`foveate top`: watch a RuntimeManager that runs in another process of the same user."""

from __future__ import annotations

import math
import re
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from foveate.cli.shared.console import emit, plain_table, show
from foveate.cli.shared.options import Json
from foveate.errors import FoveateError
from foveate.runtime.readings import UNITS
from foveate.runtime.status import find_status, status_folder
from foveate.sizes import format_bytes

_BAR = 24


def top(
    pid: Annotated[int | None, typer.Argument(help="The process; the only one with a manager if not given.")] = None,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds from one look to the next.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and exit.")] = False,
    json_output: Json = False,
) -> None:
    """Show a running manager: the point on its frontier, sensors beside their limits, levels by layer, last moves."""
    status = find_status(status_folder(), pid)
    if json_output:
        print(emit(status))
        return
    console = Console(highlight=False)
    if once or not console.is_terminal:
        show(*view(status))
        return
    with Live(Group(*view(status)), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(every)
            try:
                status = find_status(status_folder(), int(status["pid"]))
            except FoveateError:
                break  # the manager was closed, or its process ended
            live.update(Group(*view(status)), refresh=True)
    show(f"the manager of process {status['pid']} has ended")


def view(status: Mapping[str, Any]) -> list[RenderableType]:
    """What is shown of a status."""
    index, last = int(status["index"]), int(status["last"])
    age = max(time.time() - float(status["updated"]), 0.0)
    head = (
        f"process {status['pid']}, {status['model']}: index {index} of {last} {_bar(index, last)} "
        f"{_number(status['bits'], '.2f')} bits a weight, expected KL {_number(status['kl'], '.3g')} nats a token"
    )
    state = (
        f"{status['switches']} moves, mean expected KL {_number(status['expected_kl'], '.3g')}, "
        f"{format_bytes(float(status['bytes_read']))} read a token, seen {age:.1f} s ago"
        + ("" if status["admits"] else "; no new work is admitted")
    )
    return [Text(head, style="bold"), state, _sensors(status), _layers(status), _moves(status)]


def _sensors(status: Mapping[str, Any]) -> RenderableType:
    table = plain_table("sensor", "now", "limit")
    limits = status["limits"]
    for name, reading in status["readings"].items():
        value = reading["value"]
        shown = f"unavailable: {reading['reason']}" if value is None else _with_unit(name, value)
        table.add_row(name, shown, _with_unit(name, limits[name]) if name in limits else "-")
    if "quality" in limits:
        table.add_row(
            "quality budget left", f"{_number(status['credit'], '.3g')} nats", f"{limits['quality']:g} a pass"
        )
    return table


def _layers(status: Mapping[str, Any]) -> RenderableType:
    """Mean level of the weights of each layer: the part of a name up to its last number, or the whole of it."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, (level, weights) in status["levels"].items():
        found = re.match(r"(.*?\.\d+)(?=[.:])", name)
        layer = found[1] if found else name.partition(":")[0]
        sums[layer][0] += level * weights
        sums[layer][1] += weights
    table = plain_table("layer", "mean level", "")
    table.columns[2].justify = "left"
    for layer, (total, weights) in sums.items():
        mean = total / max(weights, 1)
        table.add_row(layer, f"{mean:.2f}", _bar(mean, 8))
    return table


def _moves(status: Mapping[str, Any]) -> RenderableType:
    table = plain_table("last moves", "", "why")
    table.columns[2].justify = "left"
    for move in reversed(status["moves"]):
        table.add_row(f"{move['ago']:.1f} s ago", f"{move['before']} -> {move['index']}", move["reason"])
    return table


def _bar(value: float, most: float) -> str:
    filled = round(_BAR * min(max(value / most, 0.0), 1.0)) if most > 0 else 0
    return "█" * filled + "░" * (_BAR - filled)


def _with_unit(name: str, value: float) -> str:
    unit = UNITS.get(name, "")
    if unit == "B":
        return format_bytes(value)
    if unit == "s":
        return f"{1e3 * value:.1f} ms"
    return f"{value:.3g} {unit}".strip()


def _number(value: float | None, form: str) -> str:
    return "unknown" if value is None or not math.isfinite(value) else format(value, form)
