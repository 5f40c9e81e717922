"""Options that several commands share, and how their text becomes values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from foveate.allocate import Constraints
from foveate.cli.shared.console import log
from foveate.errors import LevelError, SiteError
from foveate.formats.levels import NESTED_LEVELS, check_input_level, check_weight_level
from foveate.precision.budgets import Budget
from foveate.precision.maps import PrecisionMap
from foveate.sizes import format_bytes

Folder = Annotated[Path, typer.Argument(metavar="OUT", help="A folder that `foveate quantize` wrote.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else.")]
Data = Annotated[Path | None, typer.Option("--data", help="A text file, tokenized with the model's tokenizer.")]
Tokens = Annotated[Path | None, typer.Option("--tokens", help="Token ids instead: .npy or .safetensors.")]
Samples = Annotated[int, typer.Option(min=1, help="Windows of text to use (for an embedding model: lines).")]
Length = Annotated[int | None, typer.Option(min=2, help="Tokens a window; 512, or what the model allows if less.")]
Batch = Annotated[int, typer.Option(min=1, help="Windows that run at once.")]
Bits = Annotated[float | None, typer.Option(help="Budget: average bits a weight, scales counted.")]
Bytes = Annotated[str | None, typer.Option("--bytes", help="Budget: memory, as 800MiB or 6GB or 123456.")]
Loss = Annotated[float | None, typer.Option(help="Budget: the most loss, in nats a token for a language model.")]
Memory = Annotated[
    str | None, typer.Option(help="The most memory to take meanwhile, as 6GiB; three quarters of what is free.")
]
Levels = Annotated[str, typer.Option(help="Levels to choose among; with 0 a tile may be dropped.")]
Tie = Annotated[list[str] | None, typer.Option(metavar="PATTERN,...", help="Weights that get one level; repeatable.")]
PerWeight = Annotated[bool, typer.Option("--per-weight", help="One level a weight, not one a tile.")]
Check = Annotated[
    bool, typer.Option("--check", help="Exit with 1 if the map is worse than uniform precision, or over --loss.")
]

ALL_LEVELS = "2,3,4,6,8"


def budget_of(bits: float | None, bytes_: str | None, loss: float | None) -> Budget | None:
    """The budget given; None if none was. Raises `BudgetError` for several."""
    if bits is None and bytes_ is None and loss is None:
        return None
    return Budget(bits=bits, bytes=bytes_, loss=loss)


def constraints_of(levels: str, per_weight: bool, tie: Sequence[str] | None, input_bits: float | None) -> Constraints:
    """What a map must keep to beside its budget."""
    return Constraints(levels=levels_of(levels), per_tile=not per_weight, tie=ties_of(tie), input_bits=input_bits)


def say_unused(budget: Budget, plan: PrecisionMap, levels: Sequence[int] = NESTED_LEVELS) -> None:
    """Warn where a budget decides nothing: all of it is more than the largest map takes, or than the smallest loses."""
    there = {level for site in plan.weight_sites() for level, tiles in plan.counts(site).items() if tiles}
    end = min(levels) if budget.loss is not None else max(levels)
    if there != {end}:
        return
    if budget.loss is not None:
        log.warning("a loss of %g is more than every weight at %d bits, the least to choose, loses", budget.loss, end)
        return
    limit, takes = (
        (f"{budget.bits:g} bits", f"{plan.bits:.4g}")
        if budget.bits is not None
        else (format_bytes(float(budget.bytes or 0)), format_bytes(plan.bytes_resident))
    )
    log.warning("a budget of %s is more than every weight at %d bits takes, which is %s", limit, end, takes)


def level_of(text: str) -> int:
    """A level that weights can have."""
    try:
        level = int(text)
    except ValueError:
        raise LevelError(f"level (={text!r}) is not a number") from None
    return check_weight_level(level)


def levels_of(text: str) -> list[int]:
    """`8,4,2` -> [8, 4, 2]."""
    return [level_of(word) for word in text.split(",")]


def input_levels_of(text: str) -> list[int]:
    """`8,4` -> [8, 4], levels that inputs can have."""
    return [check_input_level(int(word)) if word.isdigit() else level_of(word) for word in text.split(",")]


def ties_of(texts: Sequence[str] | None) -> list[tuple[str, ...]]:
    """`*.q_proj,*.k_proj` -> patterns of weight sites."""
    return [tuple(weight_pattern(word.strip()) for word in text.split(",")) for text in texts or ()]


def weight_pattern(text: str) -> str:
    """A pattern of modules means their weights."""
    return text if ":" in text or text.endswith("*") else f"{text}:weight"


def settings_of(texts: Sequence[str] | None) -> list[tuple[str, str]]:
    """`*.mlp.*=3` -> (pattern, level)."""
    found = []
    for text in texts or ():
        pattern, equals, level = text.rpartition("=")
        if not equals or not pattern:
            raise SiteError(f"--set {text!r} is not PATTERN=LEVEL")
        found.append((pattern, level))
    return found
