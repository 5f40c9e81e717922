"""demo: the whole of foveate in three minutes, on a model that is made on the spot.

    train -> quantize -> allocate -> verify -> save, load -> change precision in mid-sentence -> report

Each step says what it does and why: on stdout, or on stderr when stdout has the JSON object. Bars go to stderr.
"""

from __future__ import annotations

import codecs
import copy
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import foveate as fv
from foveate.cli.demo.cache import default_cache, trained
from foveate.cli.demo.corpus import Corpus, corpus, windows
from foveate.cli.demo.training import Progress, Recipe, Trained
from foveate.cli.shared.console import check_writable, emit, plain_table
from foveate.cli.shared.tables import legend
from foveate.kernels.threads import threads
from foveate.nn.foreign.cache_argument import cache_argument, cache_of
from foveate.nn.registry import registry_of
from foveate.precision.maps import PrecisionMap
from foveate.precision.profiles import Profile
from foveate.report import Measured, html
from foveate.report.palette import LEVEL_COLOURS, LEVEL_INKS
from foveate.sizes import format_bytes

_BITS = 4.25
_LEVELS = (8, 6, 4, 3, 2)
_PROMPT = b'def read_config(path, default=None):\n    """'
_PASSAGE = ((8, 80), (2, 60), (8, 72))  # (level, bytes to write at it); with the prompt, one training window
_TEMPERATURE = 0.5
_ROUTE = " -> ".join(str(level) for level, _ in _PASSAGE)
_CALIBRATION_WINDOWS, _HELD_OUT_WINDOWS, _WINDOWS_A_BATCH = 32, 64, 8
_STEPS = {
    "Train": "A small language model learns to write Python, byte by byte, from the standard library on this machine."
    " foveate needs no training; the demo does, to have a model without a download.",
    "Quantize": "Every weight becomes a stack of bit planes, most significant first; its precision is how many of them"
    " are read. Meanwhile foveate measures what each tile of weights would cost the model at fewer bits.",
    "Allocate": f"Given a budget of {_BITS} bits per weight on average, each tile gets the bits that it was measured"
    " to need.",
    "Verify": "A prediction is not a measurement, so every precision now runs on files that nothing here has seen."
    " [bold]Loss[/]: surprise at each next byte, in nats. [bold]Drift[/]: how far the predictions moved from float32's"
    " (KL divergence). [bold]Same guess[/]: how often the likeliest next byte is float32's.",
    "Save and load": "One folder holds every precision, a file for each plane: a small machine reads only the first.",
    "Change precision in mid-sentence": f"The model continues a line of Python while its weights go {_ROUTE} bits. A"
    " switch rewrites one level for each tile: no weight moves, and the model keeps its cache of the text.",
    "Report": "The map, what each part of the model is worth, and size against drift, on one page.",
}

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One line of the table: a precision, the bytes it needs in memory, and what it does to held-out text.

    Attributes:
        key: the name in the figures: `float32`, `b8`, `allocated`, `uniform`.
        label: the name for people.
        plan: the map; None for float32.
        size: bytes in memory.
        outcome: loss (`metric`, nats a byte), KL to float32 (`divergence`, nats) and agreement.
    """

    key: str
    label: str
    plan: PrecisionMap | None
    size: int
    outcome: fv.Outcome


@dataclass(frozen=True)
class Switch:
    """A change of precision in mid-sentence: the new level, its time, and the bytes of stored weights it changed."""

    level: int
    microseconds: float
    bytes_moved: int


def run(*, out: Path, cache: Path | None, json_output: bool, recipe: Recipe | None = None) -> None:
    """Run the demo.

    Args:
        out: the folder for the quantized model and `report.html`.
        cache: the folder that keeps the trained model; the user's cache folder if None.
        json_output: print one object with all figures on stdout, and everything else on stderr.
        recipe: what to train; the three-minute recipe if None.

    Raises:
        DataError: Python's standard library is not here as source.
        CheckpointError: `out` cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise fv.CheckpointError(f"{out} is a file, not a folder to write the demo into")
    check_writable(out)
    console = Console(stderr=json_output, highlight=False)
    recipe = recipe or Recipe()
    console.print(
        "[bold]foveate[/] stores a model once and reads it at any precision: more bits where they matter, fewer where"
        " they do not, changed while it runs. Seven steps, some three minutes, nothing downloaded."
    )
    text = corpus()
    made = _train(console, recipe, text, cache or default_cache())
    with threads(min(made.threads, torch.get_num_threads())):  # the number of threads that trained fastest
        model, reference = made.model, copy.deepcopy(made.model)
        held_out = _batches(text.held_out, _HELD_OUT_WINDOWS, recipe)
        profile = _quantize(console, model, _batches(text.train, _CALIBRATION_WINDOWS, recipe))
        plan = _allocate(console, profile)
        rows, verification = _verify(console, model, reference, profile, plan, held_out)
        plan = verification.best
        loaded, identical = _round_trip(console, model, plan, out, held_out[0])
        switches, written = _write_text(console, loaded)
        page = _report(console, out, plan, profile, rows)
        _finish(console, out, plan, rows, switches)
    if json_output:
        print(emit(_figures(made, recipe, rows, verification, identical, switches, written, out, page)))


def _step(console: Console, name: str) -> None:
    console.print(f"\n[bold]{list(_STEPS).index(name) + 1} {name}.[/] {_STEPS[name]}")


def _batches(text: Tensor, count: int, recipe: Recipe) -> list[Batch]:
    chosen = windows(text, count, recipe.window, torch.Generator().manual_seed(recipe.seed + 1))
    return [{"input_ids": part} for part in chosen.split(_WINDOWS_A_BATCH)]


# ------------------------------------------------------------------------------------------------------ the steps


def _train(console: Console, recipe: Recipe, text: Corpus, cache: Path) -> Trained:
    _step(console, "Train")
    with _bar() as watch:
        made = trained(
            recipe, text, cache, watch=watch, notice=lambda said: console.print(f"[yellow]{escape(said)}[/]")
        )
    weights = sum(p.numel() for p in made.model.parameters())
    when, pace = "earlier" if made.cached else "now", made.bytes_seen / max(made.seconds, 1e-9)
    cut = f", the time limit, {made.steps:,} of {recipe.steps:,} steps" if made.steps < recipe.steps else ""
    console.print(
        f"{weights / 1e6:.2f} million weights, trained {when} in {made.seconds:.0f} s{cut}:"
        f" {made.bytes_seen / 1e6:.2f} MB of source read, {pace:,.0f} bytes per second. Cache: {escape(str(cache))}"
    )
    return made


@contextmanager
def _bar() -> Iterator[Any]:
    """Yields the watcher of training: a bar with loss and time left, or a line every half minute where nobody looks."""
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.percentage:3.0f} %  {task.fields[said]}"))
    with Bar(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("training", total=1.0, said="")
        spoken = 0.0

        def watch(at: Progress) -> None:
            nonlocal spoken
            said = f"loss {at.loss:.3f}, {at.left:.0f} s left"
            bar.update(task, completed=at.done, said=said)
            if bar.disable and at.elapsed - spoken > 30:
                spoken = at.elapsed
                print(f"training: {at.done:.0%}, {said}", file=sys.stderr)

        yield watch


def _quantize(console: Console, model: nn.Module, batches: Sequence[Batch]) -> Profile:
    _step(console, "Quantize")
    with console.status("preparing the compiled kernels (a minute, the first time only)"):
        fv.backends()
    started = time.perf_counter()
    profile = fv.quantize(model, batches)
    sites = profile.weight_sites()
    console.print(
        f"{len(sites)} matrices, {sum(s.tiles for s in sites):,} tiles of 16 x {sites[0].group} weights,"
        f" measured on {profile.samples:,} bytes of text in {time.perf_counter() - started:.1f} s."
    )
    return profile


def _allocate(console: Console, profile: Profile) -> PrecisionMap:
    _step(console, "Allocate")
    plan = fv.allocate(profile, fv.Budget(bits=_BITS))
    console.print(Text("share of tiles: ").append_text(legend(plan)))
    return plan


def _byte_loss(output: Any, batch: Batch) -> Tensor:
    """Nats of each next byte of a batch: [n]."""
    logits_BSV, bytes_BS = output.logits, batch["input_ids"]
    return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), bytes_BS[:, 1:].flatten(), reduction="none")


def _verify(
    console: Console,
    model: nn.Module,
    reference: nn.Module,
    profile: Profile,
    plan: PrecisionMap,
    held_out: Sequence[Batch],
) -> tuple[list[Row], fv.Verification]:
    _step(console, "Verify")
    verification = fv.verify(model, plan, held_out, reference=reference)
    levels = [profile.uniform(level) for level in _LEVELS]
    plans = [*levels, plan, verification.uniform_plan]
    outcomes = fv.measure(model, plans, held_out, reference=reference, metric=_byte_loss)
    names = [*((f"b{n}", f"{n} bits") for n in _LEVELS)]
    names += [("allocated", "allocated"), ("uniform", "spread evenly")]
    rows = [
        Row(key, label, p, p.bytes_resident, o) for (key, label), p, o in zip(names, plans, outcomes[:-1], strict=True)
    ]
    size = sum(p.numel() * p.element_size() for p in reference.parameters())
    rows.append(Row("float32", "float32", None, size, outcomes[-1]))
    rows.sort(key=lambda row: (-row.size, row.key != "allocated"))
    console.print(_table(rows, size))
    console.print(
        "Bits a weight, everything stored counted: planes, scales, gains. Share of float32's memory.", style="dim"
    )
    ours, even = verification.measured.divergence, verification.uniform.divergence
    change = abs(1 - ours / max(even, 1e-12))
    console.print(
        f"At the same bytes, allocated drifts {change:.0%} {'less' if verification.holds else 'more'}"
        f" than spread evenly ({ours:.4f} against {even:.4f}; foveate had predicted {verification.predicted:.4f})."
        + ("" if verification.holds else " So foveate keeps the even map.")
    )
    return rows, verification


def _table(rows: Sequence[Row], full: int) -> Table:
    table = plain_table("precision", "bits", "in memory", "share", "loss", "drift", "same guess")
    for row in rows:
        o = row.outcome
        bits = 32.0 if row.plan is None else row.plan.bits
        cells = [f"{bits:.2f}", format_bytes(row.size), f"{row.size / full:.0%}"]
        cells += [f"{o.metric:.4f}", f"{o.divergence:.4f}", f"{o.agreement:.1%}"]
        table.add_row(row.label, *cells, style="bold" if row.key == "allocated" else "")
    return table


def _round_trip(
    console: Console, model: nn.Module, plan: PrecisionMap, out: Path, batch: Batch
) -> tuple[nn.Module, dict[str, bool]]:
    _step(console, "Save and load")
    fv.apply(model, plan)
    fv.save(model, out)
    loaded = fv.load(out)
    top = fv.profile_of(model).uniform(8)
    identical = {}
    with torch.no_grad():
        for name, one in (("allocated", plan), ("b8", top)):
            logits = []
            for m in (model, loaded):
                fv.apply(m, one)
                logits.append(m(**batch).logits)
            identical[name] = torch.equal(*logits)
    size = sum(f.stat().st_size for f in out.glob("foveate-plane*")) + sum(
        f.stat().st_size for f in out.glob("foveate-scales*")
    )
    said = "bit for bit those of the model saved" if all(identical.values()) else "[red]not those of the model saved[/]"
    console.print(
        f"{escape(str(out))}: {format_bytes(size)} of planes and scales. The loaded model's outputs are {said}."
    )
    return loaded, identical


def _write_text(console: Console, model: nn.Module) -> tuple[list[Switch], str]:
    _step(console, "Change precision in mid-sentence")
    switches: list[Switch] = []
    written = ""
    console.print(_PROMPT.decode(), end="", style="dim", markup=False, soft_wrap=True)
    for level, piece, switch in _passages(model):
        if switch is not None:
            switches.append(switch)
            mark = f"<{level} bits: {switch.microseconds:.0f} µs, {switch.bytes_moved} bytes moved>"
            console.print(mark, end="", style="bold reverse", markup=False, soft_wrap=True)
        written += piece
        style = f"{LEVEL_INKS[level]} on {LEVEL_COLOURS[level]}"
        console.print(piece, end="", style=style, markup=False, soft_wrap=True)
        console.file.flush()
    console.print()
    return switches, written


def _passages(model: nn.Module) -> Iterator[tuple[int, str, Switch | None]]:
    """Sample bytes and give them as characters, with the level they were computed at, and the switch before them."""
    profile = fv.profile_of(model)
    plans = {level: profile.uniform(level) for level, _ in _PASSAGE}
    generator = torch.Generator().manual_seed(0)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    fv.apply(model, plans[_PASSAGE[0][0]])
    given, cache, here = torch.tensor([list(_PROMPT)]), None, _PASSAGE[0][0]
    with torch.no_grad():
        for level, count in _PASSAGE:
            switch = _switched(model, plans[level], level) if level != here else None
            here = level
            for _ in range(count):
                output = model(input_ids=given, **cache_argument(model, cache), use_cache=True)
                cache = cache_of(output)
                likely = (output.logits[0, -1].float() / _TEMPERATURE).softmax(-1)
                given = torch.multinomial(likely, 1, generator=generator)[None]
                piece = decoder.decode(bytes([int(given)]))
                shown = "".join(c if c == "\n" or (c.isascii() and c.isprintable()) else "·" for c in piece)
                yield level, shown, switch
                switch = None


def _switched(model: nn.Module, plan: PrecisionMap, level: int) -> Switch:
    """Apply a map, and look whether any stored tensor has another address or other contents afterwards."""
    stored = [t for w in registry_of(model).weights.values() for t in (*w.value.planes, w.value.scales)]
    before = [(t.data_ptr(), t._version) for t in stored]
    started = time.perf_counter()
    fv.apply(model, plan)
    cost = (time.perf_counter() - started) * 1e6
    moved = sum(t.nbytes for t, was in zip(stored, before, strict=True) if (t.data_ptr(), t._version) != was)
    return Switch(level, cost, moved)


def _report(console: Console, out: Path, plan: PrecisionMap, profile: Profile, rows: Sequence[Row]) -> Path:
    _step(console, "Report")
    page = out / "report.html"
    content = html(
        plan,
        title="foveate demo",
        profile=profile,
        frontier=fv.frontier(profile),
        measured=[Measured(r.label, r.plan, r.outcome, is_default=r.plan is plan) for r in rows],
        metric="loss, nats a byte",
    )
    page.write_text(content, encoding="utf-8")
    console.print(f"Open {escape(str(page))}")
    return page


def _finish(console: Console, out: Path, plan: PrecisionMap, rows: Sequence[Row], switches: Sequence[Switch]) -> None:
    kept = next(row for row in rows if row.plan is plan)
    share = kept.size / next(row.size for row in rows if row.plan is None)
    slowest = max(s.microseconds for s in switches)
    console.print(
        f"\n[bold]Seen:[/] one stored model, every precision; at {share:.0%} of float32's memory the same guess"
        f" {kept.outcome.agreement:.1%} of the time; precision changed in {slowest:.0f} µs."
    )
    console.print(f"[bold]Look closer:[/] foveate inspect {escape(str(out))}")
    console.print("[bold]Your model:[/]  foveate quantize YOUR_MODEL_FOLDER OUT --data TEXT_FILE --bits 4.25")


def _figures(
    made: Trained,
    recipe: Recipe,
    rows: Sequence[Row],
    verification: fv.Verification,
    identical: dict[str, bool],
    switches: Sequence[Switch],
    written: str,
    out: Path,
    page: Path,
) -> dict[str, Any]:
    figures: dict[str, float] = {
        "train_seconds": made.seconds,
        "train_steps": made.steps,
        "train_bytes_per_second": made.bytes_seen / max(made.seconds, 1e-9),
        "kl_predicted": verification.predicted,
        "allocated_over_uniform_kl": verification.measured.divergence / max(verification.uniform.divergence, 1e-12),
        "outputs_identical": int(all(identical.values())),
        "switch_us_max": max(s.microseconds for s in switches),
        "bytes_moved": sum(s.bytes_moved for s in switches),
    }
    for row in rows:
        figures[f"bytes_resident_{row.key}"] = row.size
        figures[f"loss_{row.key}"] = row.outcome.metric if row.outcome.metric is not None else float("nan")
        figures[f"kl_{row.key}"] = row.outcome.divergence
        figures[f"agreement_{row.key}"] = row.outcome.agreement
    return {
        "figures": figures,
        "recipe": asdict(recipe),
        "cached": made.cached,
        "threads": made.threads,
        "products": made.products,
        "switches": [asdict(s) for s in switches],
        "text": _PROMPT.decode() + written,
        "folder": str(out),
        "report": str(page),
    }
