"""Options that several commands share, and how their text becomes values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from foveate.allocate import Constraints
from foveate.cli.shared.console import log
from foveate.errors import LevelError, SiteError
from foveate.formats.levels import NESTED_LEVELS, check_input_level, check_tile_level
from foveate.precision.budgets import Budget
from foveate.precision.maps import PrecisionMap
from foveate.sizes import format_bytes

Folder = Annotated[Path, typer.Argument(metavar="OUT", help="A folder that `foveate quantize` wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Data = Annotated[Path | None, typer.Option("--data", help="Text file, tokenized with the model's own tokenizer.")]
Tokens = Annotated[
    Path | None, typer.Option("--tokens", help="File of token ids (.npy, .safetensors) in place of --data.")
]
Samples = Annotated[int, typer.Option(min=1, help="Windows of text to use; lines for an embedding model.")]
Length = Annotated[int | None, typer.Option(min=2, help="Tokens in a window. Default: 512, or the model's limit.")]
Batch = Annotated[int, typer.Option(min=1, help="Windows in a batch.")]
ByNeed = Annotated[
    int | None,
    typer.Option(min=1, help="Windows of text, or lines, to use. Default: by the width of the layers."),
]
BatchByLength = Annotated[int | None, typer.Option(min=1, help="Windows in a batch. Default: about 512 tokens.")]
Bits = Annotated[float | None, typer.Option(help="Budget: average bits per weight, scales included.")]
Bytes = Annotated[str | None, typer.Option("--bytes", help="Budget: bytes in memory, such as 800MiB, 6GB or 123456.")]
Loss = Annotated[float | None, typer.Option(help="Budget: largest loss; nats per token for a language model.")]
Latency = Annotated[
    str | None, typer.Option(help="Budget: time a token, such as 30ms, by times that --frontier with --data measured.")
]
Memory = Annotated[
    str | None,
    typer.Option(help="Memory that calibration may use, such as 6GiB. Default: three times the model's, or more."),
]
Limit = Annotated[
    str | None,
    typer.Option(
        "--memory", help="Memory that the model may take, such as 300MiB or auto; planes that do not fit stay on disk."
    ),
]
Levels = Annotated[str, typer.Option(help="Levels to choose among. With 0 among them, tiles may be dropped.")]
Tie = Annotated[list[str] | None, typer.Option(metavar="PATTERN,...", help="Weights that share one level; repeatable.")]
PerWeight = Annotated[bool, typer.Option("--per-weight", help="Choose one level for each weight, not for each tile.")]
Check = Annotated[
    bool, typer.Option("--check", help="Exit with code 1 if the map is worse than uniform precision or exceeds --loss.")
]

ALL_LEVELS = "2,3,4,6,8"


def budget_of(bits: float | None, bytes_: str | None, loss: float | None, latency: str | None = None) -> Budget | None:
    """The budget that the options give, or None without one. Raises `BudgetError` for several."""
    if bits is None and bytes_ is None and loss is None and latency is None:
        return None
    return Budget(bits=bits, bytes=bytes_, loss=loss, latency=latency)


def constraints_of(levels: str, per_weight: bool, tie: Sequence[str] | None, input_bits: float | None) -> Constraints:
    """The constraints that the options put on a map besides its budget."""
    return Constraints(levels=levels_of(levels), per_tile=not per_weight, tie=ties_of(tie), input_bits=input_bits)


def warn_if_budget_is_unused(budget: Budget, plan: PrecisionMap, levels: Sequence[int] = NESTED_LEVELS) -> None:
    """Warn about a budget that decides nothing, since the largest map costs less, or the smallest map loses less."""
    used = {level for site in plan.weight_sites() for level, tiles in plan.counts(site).items() if tiles}
    end = min(levels) if budget.loss is not None else max(levels)
    if used != {end}:
        return
    if budget.loss is not None:
        log.warning(
            "a loss of %g is more than every weight loses at %d bits, the lowest level allowed", budget.loss, end
        )
        return
    if budget.latency is not None:
        log.warning("a budget of %s a token is more than every weight at %d bits takes", budget.latency, end)
        return
    limit, takes = (
        (f"{budget.bits:g} bits", f"{plan.bits:.4g}")
        if budget.bits is not None
        else (format_bytes(float(budget.bytes or 0)), format_bytes(plan.bytes_resident))
    )
    log.warning("a budget of %s is more than every weight at %d bits takes, which is %s", limit, end, takes)


def level_of(text: str) -> int:
    """The level of weights that a text names."""
    try:
        level = int(text)
    except ValueError:
        raise LevelError(f"level (={text!r}) is not a number") from None
    return check_tile_level(level)


def levels_of(text: str) -> list[int]:
    """`8,4,2` -> [8, 4, 2]."""
    return [level_of(word) for word in text.split(",")]


def input_levels_of(text: str) -> list[int]:
    """`8,4` -> [8, 4], as levels of inputs."""
    return [check_input_level(int(word)) if word.isdigit() else level_of(word) for word in text.split(",")]


def ties_of(texts: Sequence[str] | None) -> list[tuple[str, ...]]:
    """`*.q_proj,*.k_proj` -> patterns of weight sites."""
    return [tuple(weight_pattern(word.strip()) for word in text.split(",")) for text in texts or ()]


def weight_pattern(text: str) -> str:
    """The pattern of weight sites that a pattern of modules stands for."""
    return text if ":" in text or text.endswith("*") else f"{text}:weight"


def settings_of(texts: Sequence[str] | None) -> list[tuple[str, str]]:
    """`*.mlp.*=3` -> (pattern, level)."""
    pairs = []
    for text in texts or ():
        pattern, equals, level = text.rpartition("=")
        if not equals or not pattern:
            raise SiteError(f"--set {text!r} is not PATTERN=LEVEL")
        pairs.append((pattern, level))
    return pairs
