"""`foveate report`: one HTML file about the default map of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import foveate as fv
from foveate.cli.evaluate import METRIC, Reference, run
from foveate.cli.shared import options
from foveate.cli.shared.console import check_writable, emit, log, show
from foveate.cli.shared.data import Request
from foveate.errors import CheckpointError, DataError
from foveate.report import Measured, html

_FRONTIER_POINTS = 32


def report(
    out: options.Folder,
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("report.html"),
    data: options.Data = None,
    tokens: options.Tokens = None,
    samples: options.Samples = 32,
    length: options.Length = None,
    batch: options.Batch = 4,
    reference: Reference = None,
    json_output: options.Json = False,
) -> None:
    """Write an HTML page about a folder's default map: where its bits are, its size and its predicted loss.

    With --data or --tokens the page also shows what each precision measures on them.
    """
    head = fv.read_head(out)
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise CheckpointError(f"cannot write {output}: give a file in a folder that exists")
    check_writable(output)
    request = Request(data, tokens, samples, length, batch)
    if reference is not None and not request.given:
        raise DataError("--reference needs data to compare on: give --data or --tokens")
    profile = None
    if head.profile is None:
        log.info("%s holds no profile: the report shows neither sensitivity nor the frontier", out)
    else:
        profile = fv.load_profile(out)
    measured: list[Measured] = run(out, request, reference, None) if request.given else []
    page = html(
        head.plan,
        title=out.absolute().name,
        profile=profile,
        frontier=() if profile is None else fv.frontier(profile, _FRONTIER_POINTS),
        measured=measured,
        metric=METRIC,
    )
    output.write_text(page, encoding="utf-8")
    if json_output:
        print(emit({"report": str(output), "bytes": len(page.encode())}))
    else:
        show(f"wrote {output}: open it in a browser")
