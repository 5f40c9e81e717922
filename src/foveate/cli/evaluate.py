"""`foveate eval`: what each precision loses, measured on the user's data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from torch import nn

import foveate as fv
from foveate.cli.shared import options
from foveate.cli.shared.console import emit, log, show
from foveate.cli.shared.data import Request, batches, describe, next_token_loss, windows
from foveate.cli.shared.models import config_of, is_causal, load_original, load_planes, original_config
from foveate.cli.shared.tables import outcome_figures, outcomes_table
from foveate.errors import PlaneNotResidentError
from foveate.formats.levels import NESTED_LEVELS
from foveate.precision.maps import uniform
from foveate.report import Measured
from foveate.report.layers import dense_bytes
from foveate.report.page import loss_name

#: The heading of `next_token_loss` in tables.
METRIC = "loss, nats per token"
Reference = Annotated[str | None, typer.Option(help="The original model to compare with. Default: every plane.")]


def evaluate(
    out: options.Folder,
    data: options.Data = None,
    tokens: options.Tokens = None,
    samples: options.Samples = 32,
    length: options.Length = None,
    batch: options.Batch = 4,
    reference: Reference = None,
    levels: Annotated[str | None, typer.Option(help="Levels to measure, such as 8,4,2. Default: all stored.")] = None,
    json_output: options.Json = False,
) -> None:
    """Measure loss, divergence and agreement at each level and with the default map, compared with a reference."""
    head = fv.read_head(out)
    wanted = None if levels is None else options.levels_of(levels)
    measured = run(out, Request(data, tokens, samples, length, batch), reference, wanted)
    if json_output:
        dense = dense_bytes(head.plan, 4)
        print(emit({"folder": str(out), "bytes_float32": dense, "maps": [outcome_figures(m) for m in measured]}))
        return
    objective = None if head.profile is None else str(head.profile["objective"])
    show(outcomes_table(measured, dense_bytes(head.plan, 4) if reference else None, METRIC, loss_name(objective)))


def run(out: Path, request: Request, reference: str | None, levels: list[int] | None) -> list[Measured]:
    """Measure a folder's uniform levels and its default map; the last entry is the reference.

    Args:
        out: the folder.
        request: the data.
        reference: the name of the original model, or None for the folder's own model with every plane.
        levels: the uniform levels to measure, or None for all that the folder stores.
    """
    config = config_of(str(out))
    if reference is not None:
        original_config(reference)
    samples = windows(request, str(out), config)
    log.info("measuring on %s", describe(samples))
    model = load_planes(out)
    profile = None if fv.read_head(out).profile is None else fv.load_profile(out)
    plans = _plans(model, fv.current_map(model), levels, profile)
    original = None if reference is None else load_original(reference)
    metric = next_token_loss if is_causal(config) else None
    got = fv.measure(model, list(plans.values()), batches(samples, request.batch), reference=original, metric=metric)
    measured = [
        Measured(label, plan, outcome, label == "default map")
        for (label, plan), outcome in zip(plans.items(), got, strict=False)
    ]
    return [*measured, Measured("every plane" if original is None else "original, float32", None, got[-1])]


def _plans(
    model: nn.Module, default: fv.PrecisionMap, levels: list[int] | None, profile: fv.Profile | None
) -> dict[str, fv.PrecisionMap]:
    """The uniform maps that the folder's planes allow, and the default map, by label."""
    plans = {}
    for level in sorted(levels or NESTED_LEVELS, reverse=True):
        plan = uniform(default.sites, level, default.other_bytes) if profile is None else profile.uniform(level)
        try:
            fv.apply(model, plan)
        except PlaneNotResidentError:
            if levels is not None:
                raise
            log.info("%d bits everywhere cannot be measured: the folder keeps fewer planes", level)
        else:
            plans[f"{level} bits"] = plan
    fv.apply(model, default)
    return {**plans, "default map": default}
