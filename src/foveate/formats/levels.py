"""Levels: how many bits a weight, an input or a cached number has, and which planes that takes.

A weight's planes hold 2, 1, 1, 2 and 2 bits, most significant first, so its nested levels are 2, 3, 4, 6 and 8 (and 0:
no plane is read, and the weight is zero). Levels 16 and 32 are exact: no plane gives them. They are of tiles that are
stored as floating point. `docs/format.md` has the whole stored form.
"""

from __future__ import annotations

from collections.abc import Iterable

from foveate.errors import LevelError

#: Bits of a code that each plane holds, the most significant plane first.
PLANE_BITS: tuple[int, ...] = (2, 1, 1, 2, 2)
PLANES = len(PLANE_BITS)
NESTED_LEVELS: tuple[int, ...] = (2, 3, 4, 6, 8)
WEIGHT_LEVELS: tuple[int, ...] = (0, *NESTED_LEVELS)
EXACT_LEVELS: tuple[int, ...] = (16, 32)
#: All levels that a tile of a weight can have.
TILE_LEVELS: tuple[int, ...] = (*WEIGHT_LEVELS, *EXACT_LEVELS)
#: Levels at which scales are multiplied by a gain; above them the gain is 1 (docs/decisions.md).
GAINED_LEVELS: tuple[int, ...] = (2, 3)
INPUT_LEVELS: tuple[int, ...] = (4, 8, 16, 32)
#: Levels of cached keys and values; 32 is exact, and so is 16 for numbers of 16 bits.
CACHE_LEVELS: tuple[int, ...] = (2, 4, 8, 16, 32)
TOP_LEVEL = NESTED_LEVELS[-1]
#: For each reach, a step of the anchor in steps of the residual at 8 bits. The residual has 16 values, so where a step
#: of the anchor is fewer of its steps, it reaches beyond that step (docs/format.md).
ANCHOR_STEPS: tuple[int, ...] = (16, 8, 4, 12)
REACHES: tuple[int, ...] = tuple(range(len(ANCHOR_STEPS)))

_PLANES_OF = {0: 0, **{level: i + 1 for i, level in enumerate(NESTED_LEVELS)}}


def _listing(levels: Iterable[int]) -> str:
    return ", ".join(map(str, levels))


def check_weight_level(level: int) -> int:
    """Return `level` if planes give it, else raise `LevelError`."""
    if level in _PLANES_OF:
        return level
    if level in EXACT_LEVELS:
        raise LevelError(
            f"level (={level}) is exact, and planes give no exact level: choose one of {_listing(WEIGHT_LEVELS)}"
        )
    raise LevelError(f"level (={level}) is not one of {_listing(WEIGHT_LEVELS)}")


def check_tile_level(level: int) -> int:
    """Return `level` if a tile of a weight can have it, else raise `LevelError`."""
    if level in TILE_LEVELS:
        return level
    raise LevelError(f"level (={level}) is not one of {_listing(TILE_LEVELS)}")


def check_input_level(level: int) -> int:
    """Return `level` if inputs can be quantized to it, else raise `LevelError`."""
    if level in INPUT_LEVELS:
        return level
    raise LevelError(f"input level (={level}) is not one of {_listing(INPUT_LEVELS)}")


def input_bits_of(level: int) -> float:
    """Bits that a value of an input takes at a level. At 4 this includes one byte for each block of 32 values, which
    holds the block's step and zero point. The scale of a row is not included.
    """
    return 4.25 if level == 4 else float(level)


def check_cache_level(level: int) -> int:
    """Return `level` if keys and values can be cached at it, else raise `LevelError`."""
    if level in CACHE_LEVELS:
        return level
    raise LevelError(f"cache level (={level}) is not one of {_listing(CACHE_LEVELS)}")


def cache_bits_of(level: int, group: int) -> float:
    """Bits that a cached number takes at a level, including its share of the range of its group. Level 32 is exact and
    counts as 32 bits, although it takes 16 in a model of 16-bit numbers.
    """
    return 32.0 if level == 32 else level + 32 / group


def planes_of(level: int) -> int:
    """How many planes a weight level reads: 0, 1, 2, 3, 4, 5 for levels 0, 2, 3, 4, 6, 8."""
    return _PLANES_OF[check_weight_level(level)]


def code_range(level: int, reach: int) -> int:
    """The greatest code `C` of a nested level: codes are 0..C, centred at C/2 (docs/format.md, "Values")."""
    if level <= 4:
        return (1 << level) - 1
    low = 1 << (level - 4)
    return 15 * (ANCHOR_STEPS[reach] * low // 16) + low - 1


def code_step(level: int, reach: int) -> float:
    """The size of one code step at a nested level, in units of the 4-bit scale `s`."""
    return float(2.0 ** (4 - level)) if level <= 4 else 2.0 ** (8 - level) / ANCHOR_STEPS[reach]
