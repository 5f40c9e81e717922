"""The frontier of a folder, as `foveate allocate --frontier` makes it and `foveate inspect` shows it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

import foveate as fv
from foveate.cli.shared.console import log, plain_table
from foveate.cli.shared.data import Request, batches, describe, windows
from foveate.cli.shared.models import config_of, load_planes
from foveate.report.page import figure
from foveate.sizes import format_bytes, format_seconds

#: Rows of the table of a frontier that was not measured.
_ROWS = 10


def make(out: Path, maps: int, constraints: fv.Constraints, request: Request | None) -> fv.Frontier:
    """Make a frontier from the profile of a folder, measure it if there are data, and store it in the folder.

    Args:
        out: the folder.
        maps: the largest number of maps.
        constraints: what every map must keep to.
        request: the held-out data; None to store the frontier as predicted. With data, the times of products on this
            machine are measured too, and stored with the profile.
    """
    chain = fv.frontier(fv.load_profile(out), maps, constraints)
    if request is None:
        log.info("the losses are predicted and nothing is timed: give --data or --tokens to measure")
        fv.save_frontier(out, chain)
        return chain
    found = windows(request, str(out), config_of(str(out)))
    log.info("measuring on %s", describe(found))
    model, data = load_planes(out), batches(found, request.batch)
    chain = fv.measure_frontier(model, chain, data)
    fv.save_timings(out, fv.measure_timings(model, data[0]))
    fv.save_frontier(out, chain)
    return chain


def table(chain: fv.Frontier) -> Table:
    """The points of a frontier, or about ten of its maps if it was not measured."""
    title = f"frontier of {len(chain)} maps"
    if not chain.points:
        found = plain_table(f"{title}, not measured", "index", "bits", "in memory", "read", "predicted loss")
        last = len(chain) - 1
        for index in sorted({round(last * i / (_ROWS - 1)) for i in range(_ROWS)}):
            plan = chain[index]
            sizes = (format_bytes(plan.bytes_resident), format_bytes(plan.bytes_read))
            found.add_row("", str(index), f"{plan.bits:.2f}", *sizes, figure(plan.predicted_loss))
        return found
    found = plain_table(title, "index", "bits", "in memory", "read", f"loss, {chain.unit}", "alone", "a batch")
    for point in chain.points:
        sizes = (format_bytes(chain[point.index].bytes_resident), format_bytes(point.bytes_read))
        error = "" if math.isnan(point.standard_error) else f" ± {figure(point.standard_error)}"
        times = ("–" if t is None else format_seconds(t) for t in (point.seconds, point.batch_seconds))
        loss = f"{figure(point.divergence)}{error}"
        found.add_row(Text(point.name), str(point.index), f"{point.bits:.2f}", *sizes, loss, *times)
    if chain.machine:
        found.caption = f"times on {chain.machine}"
    return found


def figures(chain: fv.Frontier) -> dict[str, Any]:
    """A frontier, as it is printed in JSON."""
    return {
        "maps": len(chain),
        "unit": chain.unit,
        "machine": chain.machine,
        "bits": [plan.bits for plan in chain],
        "bytes_resident": [plan.bytes_resident for plan in chain],
        "bytes_read": [plan.bytes_read for plan in chain],
        "predicted_loss": [plan.predicted_loss for plan in chain],
        "points": [
            {
                "index": point.index,
                "name": point.name,
                "divergence": point.divergence,
                "standard_error": point.standard_error,
                "seconds": point.seconds,
                "batch_seconds": point.batch_seconds,
            }
            for point in chain.points
        ],
    }
