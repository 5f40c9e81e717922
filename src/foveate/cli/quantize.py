"""`foveate quantize`: put a transformers model on planes and measure it; with a budget, choose and verify a map."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

import foveate as fv
from foveate.calibrate.need import ROWS_PER_INPUT, rows_needed
from foveate.calibrate.smallest_map import check_reachable, widths_of
from foveate.checkpoint import HEAD
from foveate.cli.shared import options
from foveate.cli.shared.console import check_writable, emit, log, plain_table, show
from foveate.cli.shared.data import HELD_OUT, Request, Window, batches, check_given, describe, digest, split, windows
from foveate.cli.shared.models import load_original, load_tokenizer, original_config
from foveate.cli.shared.processes import is_first, processes, shared_by_torchrun
from foveate.cli.shared.tables import bits_line, legend, map_figures, sizes_table
from foveate.errors import BudgetError, CheckpointError, DataError
from foveate.evaluate.float32_floor import ratio_text
from foveate.formats.packing import check_group
from foveate.report.layers import dense_bytes
from foveate.report.page import divergence_text, figure, loss_name
from foveate.sizes import format_bytes, parse_bytes


@shared_by_torchrun()
def quantize(
    model: Annotated[str, typer.Argument(help="A transformers model: a local folder or a hub name.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    data: options.Data = None,
    tokens: options.Tokens = None,
    samples: options.ByNeed = None,
    length: options.Length = None,
    batch: options.BatchByLength = None,
    group: Annotated[int | None, typer.Option(help="Inputs in a group: 32, 64 or 128. Default: by width.")] = None,
    skip: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Modules to leave as they are; repeatable.")
    ] = None,
    bits: options.Bits = None,
    bytes_: options.Bytes = None,
    loss: options.Loss = None,
    keep_map: Annotated[bool, typer.Option("--keep-map", help="Store only the planes that the map reads.")] = False,
    memory: options.Memory = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the model that OUT holds.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue where an interrupted run stopped.")] = False,
    exact: Annotated[
        float | None,
        typer.Option(help="Also keep this share of the tiles exact, those that lose most at few bits: 0.01."),
    ] = None,
    exact_level: Annotated[int, typer.Option(help="Bits of an exact value, 16 or 32.")] = 16,
    check: options.Check = False,
    json_output: options.Json = False,
) -> None:
    """Store a model as bit planes, measure what each tile loses at each level, and choose a precision for a budget.

    Without a budget every plane is stored and read, and `foveate allocate` can choose a precision later. With a
    budget, part of the data is held out: the chosen map is compared with the original model on it, and becomes the
    folder's default map. With --loss the map is the smallest one whose measured loss, plus twice its standard error,
    is within the limit.

    `torchrun --nproc-per-node 4 -m foveate quantize MODEL OUT` shares the work among four processes, here or on several
    machines. Every process holds the model, and the result is the same for any number of them.
    """
    budget = options.budget_of(bits, bytes_, loss)
    for option, given in (("--keep-map", keep_map), ("--check", check)):
        if given and budget is None:
            raise BudgetError(f"{option} needs a budget: give --bits, --bytes or --loss")
    if group is not None:
        check_group(group)
    kept_exact = None if exact is None else fv.KeepExact(share=exact, level=exact_level)
    if memory is not None:
        parse_bytes(memory)
    _check_target(out, model, force)
    config = original_config(model)
    request = Request(data, tokens, samples, length, batch)
    check_given(request)
    net = load_original(model)
    widths = [w for w, embedding in widths_of(net) if not embedding]
    request = replace(request, rows=rows_needed(widths))
    chosen = windows(request, model, config, more=0 if budget is None else 1 / HELD_OUT)
    calibration, held_out = (chosen, []) if budget is None else split(chosen)
    log.info("calibrating on %s", describe(calibration))
    if samples is None:
        _say_need(calibration, request.rows, max(widths, default=0))
    if held_out:
        log.info("holding out %s for verification", describe(held_out))
    if budget is not None:
        check_reachable(net, budget, group=group, skip=skip or ())
    profile = fv.quantize(
        net,
        batches(calibration, batch),
        group=group,
        skip=skip or (),
        exact=kept_exact,
        memory=memory,
        resume=out.absolute().with_name(f".{out.name}.resume-{digest(chosen)}.safetensors") if resume else None,
        progress=is_first(),
        processes=processes(),
    )
    if not is_first():
        return
    for note in profile.notes:
        log.warning("note: %s", note)
    plan = fv.current_map(net)
    verification: fv.Verification | None = None
    if budget is not None:
        plan, verification = _choose_map(net, profile, budget, model, batches(held_out, batch))
        fv.apply(net, plan)
    fv.save(net, out, keep=plan if keep_map else None)
    _save_tokenizer(model, out)
    if json_output:
        print(emit(_figures(model, out, profile, plan, verification)))
    else:
        _show_results(out, profile, plan, verification)
    if check and verification is not None and not (verification.holds and verification.within):
        raise typer.Exit(1)


def _say_need(calibration: list[Window], needed: int, widest: int) -> None:
    """Say why there are so many tokens, or that the data have too few."""
    seen = sum(int(w["input_ids"].numel()) for w in calibration)
    why = f"{needed:,} tokens are needed, {ROWS_PER_INPUT} for each of the {widest:,} inputs of the widest layer"
    log.info("%s%s", why, "" if seen >= 0.9 * needed else f"; the data have only {seen:,}")


def _check_target(out: Path, model: str, force: bool) -> None:
    """Refuse, before the work, a target that could not be written after it."""
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file: give a folder to write")
    if out.is_dir():
        if Path(model).is_dir() and out.samefile(model):
            raise CheckpointError(f"{out} is the model itself: give another folder to write")
        if any(out.iterdir()) and not (out / HEAD).exists():
            raise CheckpointError(f"{out} is not empty, and not a foveate checkpoint that could be replaced")
        if (out / HEAD).exists() and not force:
            raise CheckpointError(f"{out} holds a model already: give another folder, or --force to replace it")
    check_writable(out)


def _choose_map(
    net: nn.Module, profile: fv.Profile, budget: fv.Budget, model: str, held_out: list[Window]
) -> tuple[fv.PrecisionMap, fv.Verification]:
    """The map for a budget, or uniform precision at the same bytes where that one measures better."""
    original = load_original(model)
    if budget.loss is not None:
        verification = fv.fit_to_loss(net, budget, held_out, reference=original)
        log.info(
            "measured over predicted loss: %s", ratio_text(verification.measured.divergence, verification.predicted)
        )
    else:
        plan = fv.allocate(profile, budget)
        verification = fv.verify(net, plan, held_out, reference=original)
    options.warn_if_budget_is_unused(budget, verification.plan)
    if not verification.holds:
        log.warning(
            "warning: on the held-out data uniform precision at the same bytes is better, so it becomes the default"
        )
    return verification.best, verification


def _save_tokenizer(model: str, out: Path) -> None:
    try:
        load_tokenizer(model).save_pretrained(out)
    except DataError:
        log.info("%s has no tokenizer, so none is saved", model)


def _show_results(out: Path, profile: fv.Profile, plan: fv.PrecisionMap, verification: fv.Verification | None) -> None:
    show(
        f"{out}: {len(profile.weight_sites())} weights on planes, measured on {profile.samples:,} samples",
        bits_line(plan),
        legend(plan),
    )
    show(sizes_table(plan))
    if verification is not None:
        name = loss_name(profile.objective)
        table = plain_table(f"held out: {name}", "bits", "in memory", "predicted", "measured", "agreement")
        for label, one, got in (
            ("allocated", verification.plan, verification.measured),
            ("uniform at equal bytes", verification.uniform_plan, verification.uniform),
        ):
            table.add_row(
                label,
                f"{one.bits:.2f}",
                format_bytes(one.bytes_resident),
                figure(profile.predict(one)),
                divergence_text(got),
                f"{got.agreement:.2%}",
            )
        show(table)
        if verification.limit is not None:
            show(
                f"asked for at most {figure(verification.limit)}: {figure(verification.measured.bound)} with twice the "
                f"standard error, {'within it' if verification.within else 'NOT within it'}"
            )


def _figures(
    model: str, out: Path, profile: fv.Profile, plan: fv.PrecisionMap, verification: fv.Verification | None
) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "model": model,
        "folder": str(out),
        "weights": sum(s.weights for s in profile.weight_sites()),
        "matrices": len(profile.weight_sites()),
        "samples": profile.samples,
        "objective": profile.objective,
        "notes": list(profile.notes),
        "bytes_float32": dense_bytes(plan, 4),
        "map": map_figures(plan),
    }
    if verification is not None:
        summary["verification"] = {
            "holds": verification.holds,
            "reference": verification.reference,
            "predicted": verification.predicted,
            "limit": verification.limit,
            "bound": verification.measured.bound,
            "within": verification.within,
            "divergence": verification.measured.divergence,
            "standard_error": verification.measured.standard_error,
            "agreement": verification.measured.agreement,
            "uniform_divergence": verification.uniform.divergence,
            "uniform_agreement": verification.uniform.agreement,
            "samples": verification.measured.samples,
        }
    return summary
