"""How each peer quantizes a model: its settings, its calibration tokens, and the script that runs it.

Every piece of work runs in a process of its own, in the peer's environment. Tokens are windows of one text, evenly
spread over it as ours are, so that a peer with few windows sees all parts of the text too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.peers.child import SCRIPTS, Child, PeerError
from benchmarks.peers.environments import ENVIRONMENTS
from benchmarks.peers.quality.settings import AUTO_ROUND
from foveate.bench.calibrate import Calibrated
from foveate.bench.fresh_process.forward import spread_tokens
from foveate.bench.shared.extras import require

#: Seconds for one piece of work.
LIMIT_S = 4 * 3600.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """A model to quantize.

    Attributes:
        model: its folder, float32.
        source: the same as GGUF.
        text: the file with the calibration text.
        folder: for what is written meanwhile.
        threads: the number of threads, for every side.
        words: the size of the vocabulary.
    """

    model: Path
    source: Path
    text: Path
    folder: Path
    threads: int
    words: int

    def tokens(self, windows: int, width: int) -> Tensor:
        """Windows of the text, int64 [windows, width]."""
        sizes = Calibrated(model=str(self.model), data=str(self.text), windows=windows, length=width)
        return spread_tokens(asdict(sizes), windows * width, self.words).view(windows, width)


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What quantizing took.

    Attributes:
        seconds, seconds_cpu: wall time and processor time.
        peak: bytes.
        parts: seconds of its parts, where there are several.
        said: what the library says of itself: its version, and what it computes in.
    """

    seconds: float
    seconds_cpu: float
    peak: float
    parts: Mapping[str, float]
    said: str


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to quantize.

    Attributes:
        name: in figures.
        environment: that has the library.
        take: the function that runs it.
        settings: the library's own; what is not named has its default.
        windows: calibration windows; as many as ours takes if None.
        width: tokens in a window.
        said: the settings in words.
    """

    name: str
    environment: str
    take: Callable[[Recipe, Work, Path], Taken]
    settings: Mapping[str, Any]
    windows: int | None
    width: int
    said: str


def in_transformers(recipe: Recipe, work: Work, tokens: Path) -> Taken:
    """Quantize with `quantize_model.py`."""
    with _child(recipe, "quantize_model.py") as child:
        answer = child.ask(
            "quantize",
            form=recipe.environment,
            model=str(work.model),
            tokens=str(tokens),
            threads=work.threads,
            **recipe.settings,
        )
    said = f"{answer['version']}, computed in {answer['dtype'].removeprefix('torch.')}"
    return Taken(seconds=answer["seconds"], seconds_cpu=answer["seconds_cpu"], peak=answer["peak"], parts={}, said=said)


def in_llama_cpp(recipe: Recipe, work: Work, tokens: Path) -> Taken:
    """Make an importance matrix and quantize with it, in a process each, as llama.cpp's tools are."""
    source, matrix, out = work.folder / "float16.gguf", work.folder / "importance.npz", work.folder / "quantized.gguf"
    with _child(recipe, "quantize_gguf.py") as child:
        child.ask("widen", source=str(work.source), out=str(source))
    with _child(recipe, "quantize_gguf.py") as child:
        first = child.ask("importance", source=str(source), tokens=str(tokens), threads=work.threads, out=str(matrix))
    with _child(recipe, "quantize_gguf.py") as child:
        second = child.ask(
            "quantize",
            source=str(source),
            importance=str(matrix),
            threads=work.threads,
            out=str(out),
            **recipe.settings,
        )
    return Taken(
        seconds=first["seconds"] + second["seconds"],
        seconds_cpu=first["seconds_cpu"] + second["seconds_cpu"],
        peak=max(first["peak"], second["peak"]),
        parts={"importance": first["seconds"], "rounding": second["seconds"]},
        said=f"llama-cpp-python {first['version']}, {first['system'].strip(' |')}",
    )


def take(recipe: Recipe, work: Work, windows: int) -> Taken:
    """Run a recipe on so many windows.

    Raises:
        PeerError: there is no environment for it, or it failed.
    """
    if not ENVIRONMENTS[recipe.environment].built:
        raise PeerError(f"there is no environment for it: `python -m benchmarks.peers {recipe.environment}` makes it")
    tokens = work.folder / f"{recipe.name}.npy"
    require("numpy").save(tokens, work.tokens(windows, recipe.width).numpy())
    return recipe.take(recipe, work, tokens)


def _child(recipe: Recipe, script: str) -> Child:
    return Child(recipe.environment, ENVIRONMENTS[recipe.environment].python, SCRIPTS / script, LIMIT_S)


RECIPES = (
    Recipe(
        name="gptqmodel",
        environment="gptqmodel",
        take=in_transformers,
        settings={"bits": 4, "group_size": 128},
        windows=128,
        width=2048,
        said="4 bits, groups of 128, all else its default, packed",
    ),
    Recipe(
        name="auto_round",
        environment="auto-round",
        take=in_transformers,
        settings={
            "scheme": "W4A16",
            "iters": AUTO_ROUND["iterations"],
            "lr": AUTO_ROUND["learning_rate"],
            "batch_size": 8,
        },
        windows=128,
        width=2048,
        said="its light recipe: 4 bits, groups of 128, 50 iterations a block on 8 windows each, not packed",
    ),
    Recipe(
        name="llama_cpp",
        environment="llama-cpp",
        take=in_llama_cpp,
        settings={"type": "Q4_K_M"},
        windows=None,
        width=512,
        said="an importance matrix of the float16 model without perplexity, and Q4_K_M with it, written to a file",
    ),
)
