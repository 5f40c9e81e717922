"""What following a stream came to, as values: each decision, the verdict in a sentence, and a map over time.

A decision is taken from time to time. Most find nothing worth a move. The verdict says whether the stream ever asked
for other levels than calibration chose, which dense models rarely do and mixtures of experts often do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_SHADES = " .:-=+*#%@"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One move, or one proposal that a shadow run refused.

    Attributes:
        token: how many tokens of the stream had passed.
        source: the candidate that is in force from then on: `online`, `static`, or the name of a task.
        accepted: whether levels changed.
        tiles, bytes: tiles that moved, and the bytes of their planes that are read or no longer read.
        before, after: the divergence on the shadow sample of the map before and of the map proposed; NaN where no
            shadow run was made.
        predicted_before, predicted_after: the same as the profile predicts it, with the importance of now.
    """

    token: int
    source: str
    accepted: bool
    tiles: int
    bytes: int
    before: float
    after: float
    predicted_before: float
    predicted_after: float

    def __str__(self) -> str:
        measured = math.isfinite(self.before) and math.isfinite(self.after)
        first, second = (self.before, self.after) if measured else (self.predicted_before, self.predicted_after)
        how = "KL" if measured else "predicted KL"
        if not self.accepted:
            return f"token {self.token}: a move of {self.tiles} tiles was refused, {how} {first:.5f} -> {second:.5f}"
        what = "back to the static map" if self.source == "static" else f"shift seen, {self.source}"
        return f"token {self.token}: {what}, {self.tiles} tiles moved, {how} {first:.5f} -> {second:.5f}"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a moment of the stream looked like.

    Attributes:
        token: how many tokens had passed.
        bits: the mean level of each weight's tiles.
        importance: for each weight its importance over that of calibration.
    """

    token: int
    bits: Mapping[str, float]
    importance: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What following came to.

    Attributes:
        tokens: tokens of the stream so far.
        decisions: all moves and refusals, in order.
        shadow_tokens: tokens that were run again in shadow runs, counted once for each run.
        refused_observations: observations with NaN or Inf, which were left out.
    """

    tokens: int
    decisions: Sequence[Decision]
    shadow_tokens: int
    refused_observations: int

    @property
    def moves(self) -> int:
        """Decisions by which levels changed."""
        return sum(one.accepted for one in self.decisions)

    @property
    def tiles(self) -> int:
        """Tiles moved in all."""
        return sum(one.tiles for one in self.decisions if one.accepted)

    @property
    def bytes(self) -> int:
        """Bytes of planes of moved tiles in all."""
        return sum(one.bytes for one in self.decisions if one.accepted)

    def __str__(self) -> str:
        accepted = [one for one in self.decisions if one.accepted]
        seen = f"{self.tokens} tokens, {self.shadow_tokens} in shadow runs"
        left_out = f"; {self.refused_observations} observations with NaN or Inf left out" * bool(
            self.refused_observations
        )
        if not accepted:
            refused = f", {len(self.decisions)} moves refused" if self.decisions else ""
            return f"no shift, static is fine ({seen}{refused}{left_out})"
        return "\n".join([*map(str, accepted), f"({seen}{left_out})"])


def heat_map(history: Sequence[Snapshot], *, importance: bool = False) -> str:
    """Weights (rows) over time (columns) as text, the darker the more bits; with `importance`, the more important.

    The last line has the shades from the least to the greatest value.
    """
    if not history:
        return "nothing was followed yet"
    tables = [one.importance if importance else one.bits for one in history]
    if importance:
        tables = [{name: math.log10(max(value, 1e-3)) for name, value in table.items()} for table in tables]
    values = [value for table in tables for value in table.values()]
    low, high = min(values), max(values)
    width = max(len(name) for name in tables[0])

    def shade(value: float) -> str:
        return _SHADES[round((value - low) / (high - low) * (len(_SHADES) - 1)) if high > low else 0]

    lines = [f"{name:<{width}} |{''.join(shade(table[name]) for table in tables)}|" for name in tables[0]]
    what = "importance over calibration's, log10" if importance else "bits"
    return "\n".join([*lines, f"{what}: '{_SHADES}' from {low:.2f} to {high:.2f}; tokens 0 to {history[-1].token}"])
