"""`foveate inspect`: where a folder's bits are, read from its head without loading the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from foveate.checkpoint import opened
from foveate.checkpoint.frontier import read_frontier
from foveate.cli import frontier
from foveate.cli.shared import options
from foveate.cli.shared.console import emit, plain_table, show
from foveate.cli.shared.tables import bits_line, legend, map_figures, map_table, sizes_table
from foveate.errors import DataError
from foveate.folder.plan_memory import MemoryPlan, plan_memory
from foveate.precision.maps import PrecisionMap, Site
from foveate.report.layers import dense_bytes, layers_of, mean_level, module_path, stored_bytes
from foveate.sizes import format_bytes

Text = Annotated[
    str | None,
    typer.Option("--input", help="Show what this text makes of the model: which weights and words get more bits."),
]
Data = Annotated[Path | None, typer.Option("--data", help="With --input: a text like those that the model will see.")]
Page = Annotated[Path | None, typer.Option("--page", help="With --input: write what it shows as an HTML file, too.")]
Bits = Annotated[float, typer.Option("--bits", help="With --input: the average bits of a weight.")]


def inspect(
    out: options.Folder,
    memory: options.Limit = None,
    each: Annotated[bool, typer.Option("--all", help="Show a row for each weight instead of each layer.")] = False,
    text: Text = None,
    data: Data = None,
    bits: Bits = 4.0,
    page: Page = None,
    json_output: options.Json = False,
) -> None:
    """Show where a model's bits are: for each layer the share of its tiles at each level, the bytes in total, and the
    frontier where one is stored. With --memory, what would be in memory under that limit, what would wait on disk, and
    what that would cost. With --input, where the bits of one text are.
    """
    if text is not None:
        from foveate.cli.shared.explain import show_explanation

        show_explanation(out, text, data, bits, page, json_output)
        return
    if page is not None:
        raise DataError("--page is of --input: foveate report writes the page on a map")
    with opened(out) as folder:
        plan, size = folder.head.plan, folder.bytes
        chain = None if folder.head.frontier is None else read_frontier(folder)
    within = None if memory is None else plan_memory(out, memory)
    if within is not None:
        plan = within.plan
    if json_output:
        known = {} if chain is None else {"frontier": frontier.figures(chain)}
        limited = {} if within is None else {"memory": _of_memory(within)}
        print(emit({**_figures(out, plan, size, each), **known, **limited}))
        return
    weights = sum(s.weights for s in plan.weight_sites())
    show(
        f"{out}: {weights:,} weights, {bits_line(plan)}",
        map_table(plan, each_site=each),
        legend(plan),
        sizes_table(plan, size),
        *([] if chain is None else [frontier.table(chain)]),
        *([] if within is None else [_memory_table(within)]),
    )


def _of_memory(within: MemoryPlan) -> dict[str, Any]:
    return {
        "limit": within.limit,
        "fixed": within.fixed,
        "stays": within.stays,
        "waits": within.waits,
        "bytes_a_token": within.plan.bytes_read,
        "bytes_a_token_of_all_planes": within.whole.bytes_read,
        "predicted_loss": within.predicted_loss,
        "predicted_loss_of_all_planes": within.whole_loss,
    }


def _memory_table(within: MemoryPlan) -> Table:
    """What stays, what waits, and what both cost."""
    table = plain_table(f"within {format_bytes(within.limit)}", "planes in memory", "all planes")
    whole = within.stays + within.waits
    table.add_row("planes in memory", format_bytes(within.stays), format_bytes(whole))
    table.add_row("planes that wait on disk", format_bytes(within.waits), format_bytes(0))
    table.add_row("always in memory", format_bytes(within.fixed), format_bytes(within.fixed))
    table.add_row("bytes a token", format_bytes(within.plan.bytes_read), format_bytes(within.whole.bytes_read))
    table.add_row("predicted loss", f"{within.predicted_loss:.4g}", f"{within.whole_loss:.4g}")
    return table


def _row(plan: PrecisionMap, name: str, sites: tuple[Site, ...]) -> dict[str, Any]:
    tiles: dict[str, int] = {}
    for site in sites:
        for level, count in plan.counts(site).items():
            tiles[str(level)] = tiles.get(str(level), 0) + count
    weights, size = sum(s.weights for s in sites), stored_bytes(plan, sites)
    return {
        "name": name,
        "weights": weights,
        "tiles": tiles,
        "mean_level": mean_level(plan, sites),
        "bits": 8 * size / max(weights, 1),
        "bytes_stored": size,
    }


def _figures(out: Path, plan: PrecisionMap, size: int, each: bool) -> dict[str, Any]:
    if each:
        rows = [_row(plan, module_path(s), (s,)) for s in plan.weight_sites()]
    else:
        rows = [_row(plan, layer.name, layer.sites) for layer in layers_of(plan.sites)]
    return {
        "folder": str(out),
        "weights": sum(s.weights for s in plan.weight_sites()),
        "map": map_figures(plan),
        "bytes_folder": size,
        "bytes_float32": dense_bytes(plan, 4),
        "bytes_float16": dense_bytes(plan, 2),
        "inputs": {s.name: plan.levels[s.name] for s in plan.sites if s.kind == "input"},
        "rows": rows,
    }
