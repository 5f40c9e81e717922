"""Tables of a precision map for the terminal, made with Rich. The colours are those of the HTML report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from foveate.cli.shared.console import plain_table
from foveate.formats.levels import TILE_LEVELS, TOP_LEVEL
from foveate.precision.maps import PrecisionMap, Site
from foveate.report import Measured
from foveate.report.layers import dense_bytes, layers_of, mean_level, module_path, percent, shares, stored_bytes
from foveate.report.page import divergence_text, figure
from foveate.report.palette import LEVEL_COLOURS, LEVEL_INKS
from foveate.sizes import format_bytes


def _style(level: int) -> str:
    return f"{LEVEL_INKS[level]} on {LEVEL_COLOURS[level]}"


def level_bar(share_of: Mapping[int, float], width: int = 32) -> Text:
    """A bar whose cells show the digits of their levels, or x where they are exact, the highest level first. So it
    needs no colours.

    Args:
        share_of: the share of tiles at each level.
        width: the number of cells.
    """
    bar = Text()
    exact = {level: share_of.get(level, 0.0) * width for level in reversed(TILE_LEVELS)}
    cells = {level: math.floor(value) for level, value in exact.items()}
    left = round(sum(exact.values())) - sum(cells.values())
    for level in sorted(exact, key=lambda n: cells[n] - exact[n])[:left]:
        cells[level] += 1
    for level, count in cells.items():
        bar.append((str(level) if level <= TOP_LEVEL else "x") * count, style=_style(level))
    return bar


def legend(plan: PrecisionMap) -> Text:
    """The colour of each level, with the share of all tiles at that level."""
    text = Text()
    for level, share in reversed(shares(plan, plan.weight_sites()).items()):
        if share:
            text.append(f" {level} ", style=_style(level))
            text.append(f" {'dropped' if level == 0 else 'bits'} {percent(share)}   ")
    return text


def map_table(plan: PrecisionMap, *, each_site: bool = False, width: int = 32) -> Table:
    """Where a map's bits are: a row for each layer, or for each weight.

    Args:
        plan: the map.
        each_site: whether each weight has a row of its own.
        width: the number of cells of a bar.
    """
    table = plain_table("weight" if each_site else "layer", "weights")
    table.add_column("tiles at each level", no_wrap=True)
    for head in ("mean level", "bits", "stored"):
        table.add_column(head, justify="right")
    rows: list[tuple[str, Sequence[Site]]]
    if each_site:
        rows = [(module_path(s), [s]) for s in plan.weight_sites()]
    else:
        rows = [(layer.name, layer.sites) for layer in layers_of(plan.sites)]
    for name, sites in rows:
        weights, size = sum(s.weights for s in sites), stored_bytes(plan, sites)
        bits = 8 * size / max(weights, 1)
        table.add_row(
            Text(name),
            f"{weights:,}",
            level_bar(shares(plan, sites), width),
            f"{mean_level(plan, sites):.2f}",
            f"{bits:.2f}",
            format_bytes(size),
        )
    return table


def sizes_table(plan: PrecisionMap, on_disk: int | None = None) -> Table:
    """A map's total bytes, beside those of the same model in float32 and float16.

    Args:
        plan: the map.
        on_disk: bytes of the folder, which may hold more planes than the map reads.
    """
    table = plain_table("total", "bytes", "of float32", "of float16")
    single, half = dense_bytes(plan, 4), dense_bytes(plan, 2)
    rows = {"this map, stored": plan.bytes_stored, "in memory": plan.bytes_resident, "read a token": plan.bytes_read}
    if on_disk is not None:
        rows["the whole folder"] = on_disk
    for name, size in {**rows, "float16": half, "float32": single}.items():
        table.add_row(name, format_bytes(size), f"{size / max(single, 1):.1%}", f"{size / max(half, 1):.1%}")
    return table


def bits_line(plan: PrecisionMap) -> str:
    """A map's average bits, over weights on planes and over all parameters, and what stays in floating point."""
    text = f"{plan.bits:.2f} bits per weight on planes, scales included"
    if plan.other_parameters is not None:
        text += f"; {plan.bits_of_model:.2f} bits a parameter of the whole model"
    return f"{text}; {plan.stays_float}" if plan.stays_float else text


def outcomes_table(measured: Sequence[Measured], reference_bytes: int | None, metric: str, divergence: str) -> Table:
    """The measured outcome of each map, in a row of its own; the default map is bold.

    Args:
        measured: the maps and their outcomes, the reference last.
        reference_bytes: bytes of the reference in memory, or None if it is not the original model.
        metric: the heading of `Outcome.metric`; the column is left out where no outcome has a metric.
        divergence: the heading of `Outcome.divergence`.
    """
    with_metric = any(entry.outcome.metric is not None for entry in measured)
    table = plain_table(
        "map", "bits", "stored", "in memory", "read", *([metric] if with_metric else []), divergence, "agreement"
    )
    for entry in measured:
        own, got = entry.plan, entry.outcome
        sizes = ["–", "–", "–" if reference_bytes is None else format_bytes(reference_bytes), "–"]
        if own is not None:
            sizes = [
                f"{own.bits:.2f}",
                *(format_bytes(n) for n in (own.bytes_stored, own.bytes_resident, own.bytes_read)),
            ]
        middle = [figure(got.metric if got.metric is not None else math.nan)] if with_metric else []
        last = [divergence_text(got), f"{got.agreement:.2%}"]
        table.add_row(Text(entry.label), *sizes, *middle, *last, style="bold" if entry.is_default else "")
    return table


def map_figures(plan: PrecisionMap) -> dict[str, Any]:
    """A map's totals, as they are printed in JSON."""
    return {
        "bits": plan.bits,
        "bits_of_model": plan.bits_of_model,
        "other_parameters": plan.other_parameters,
        "bytes_stored": plan.bytes_stored,
        "bytes_resident": plan.bytes_resident,
        "bytes_read": plan.bytes_read,
        "predicted_loss": plan.predicted_loss,
    }


def outcome_figures(entry: Measured) -> dict[str, Any]:
    """A measured map, as it is printed in JSON."""
    got = entry.outcome
    return {
        "label": entry.label,
        **({} if entry.plan is None else map_figures(entry.plan)),
        "loss": got.metric,
        "divergence": got.divergence,
        "standard_error": got.standard_error,
        "agreement": got.agreement,
        "samples": got.samples,
    }
