"""`foveate audit`: what single weights lose at single levels, measured and compared with the profile."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

import foveate as fv
from foveate.cli.shared import options
from foveate.cli.shared.console import emit, log, plain_table, show
from foveate.cli.shared.data import Request, batches, describe, windows
from foveate.cli.shared.models import config_of, load_planes
from foveate.errors import CheckpointError, LevelError
from foveate.evaluate.float32_floor import ratio_text
from foveate.formats.levels import TOP_LEVEL
from foveate.precision.maps import find_sites
from foveate.report.page import figure

Sites = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Sites to lower one at a time; repeatable. Default: all weights."),
]


def audit(
    out: options.Folder,
    data: options.Data = None,
    tokens: options.Tokens = None,
    samples: options.Samples = 8,
    length: options.Length = None,
    batch: options.Batch = 4,
    sites: Sites = None,
    levels: Annotated[str, typer.Option(help="Levels to lower each site to, such as 2,3,4.")] = "3",
    json_output: options.Json = False,
) -> None:
    """Lower one weight at a time, measure the loss, and compare it with the profile's prediction.

    Each weight and level takes one pass over the data: in a large model, name some weights with --sites.
    """
    head = fv.read_head(out)
    patterns = [options.weight_pattern(p) for p in sites] if sites else ["*:weight"]
    kinds = {site.kind for pattern in patterns for site in find_sites(head.sites, pattern)}
    wanted = options.input_levels_of(levels) if kinds == {"input"} else options.levels_of(levels)
    if kinds == {"weight"} and min(wanted) >= TOP_LEVEL:
        raise LevelError(f"levels (={levels}) lower no weight: the highest level is {TOP_LEVEL}")
    if head.profile is None:
        raise CheckpointError(f"{out} holds no profile to compare with: it was saved without one")
    chosen = windows(Request(data, tokens, samples, length, batch), str(out), config_of(str(out)))
    log.info("measuring on %s", describe(chosen))
    got = fv.audit(load_planes(out).float(), batches(chosen, batch), sites=patterns, levels=wanted)
    if json_output:
        entries = [{**asdict(e), "ratio": e.ratio} for e in got.entries]
        print(
            emit({"folder": str(out), "unit": got.unit, "samples": got.samples, "ratio": got.ratio, "sites": entries})
        )
        return
    table = plain_table("site", "level", "predicted", f"measured, {got.unit}", "measured / predicted")
    for e in got.entries:
        table.add_row(
            Text(e.site),
            str(e.level),
            figure(e.predicted),
            f"{figure(e.measured)} ± {figure(e.standard_error)}",
            ratio_text(e.measured, e.predicted),
        )
    show(table, got.summary)
