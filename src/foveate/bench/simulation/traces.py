"""Requests of a recorded trace, scaled to a server: prompts by one factor, and requests shared among equal servers.

The Azure LLM inference traces of 2023 are CSV files with the columns TIMESTAMP, ContextTokens, GeneratedTokens. The
environment variable `FOVEATE_DATA` names the folder that has them in `traces/`.

Source: Patel et al., Splitwise, ISCA 2024; github.com/Azure/AzurePublicDataset.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean

from foveate.errors import DataError

#: The traces, by name.
FILES = {"conversation": "AzureLLMInferenceTrace_conv.csv", "code": "AzureLLMInferenceTrace_code.csv"}


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Requests in the order of their arrival.

    Attributes:
        arrivals: seconds since the first request.
        prompts, generated: tokens of each request's prompt and answer, at least 1 each.
    """

    arrivals: tuple[float, ...]
    prompts: tuple[int, ...]
    generated: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.arrivals or not len(self.arrivals) == len(self.prompts) == len(self.generated):
            raise DataError("a trace has at least one request, with an arrival, a prompt and an answer each")
        if any(b < a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)) or self.arrivals[0] != 0:
            raise DataError("the arrivals of a trace begin at 0 and do not go back")
        if min(self.prompts) < 1 or min(self.generated) < 1:
            raise DataError("a trace has a request without a prompt or without an answer")

    def __len__(self) -> int:
        return len(self.arrivals)

    @property
    def mean_prompt(self) -> float:
        """Mean tokens of a prompt."""
        return fmean(self.prompts)

    @property
    def mean_generated(self) -> float:
        """Mean tokens of an answer."""
        return fmean(self.generated)

    def with_prompts(self, factor: float) -> Trace:
        """The same requests with prompts of `factor` times as many tokens, at least 1."""
        return Trace(
            arrivals=self.arrivals,
            prompts=tuple(max(1, round(p * factor)) for p in self.prompts),
            generated=self.generated,
        )

    def at_rate(self, rate: float, phase: float = 0.0) -> Trace:
        """What one of several equal servers gets of the requests, each in its turn, at a mean rate.

        The requests that remain keep their times, so load rises and falls as fast as it was recorded. Only a server
        that is faster than the whole trace gets all requests, closer together.

        Args:
            rate: requests a second.
            phase: which of the servers, 0 to 1.
        """
        if not 0 < rate < math.inf:
            raise DataError(f"rate (={rate}) is not a positive finite number")
        share = rate * self.arrivals[-1] / max(len(self) - 1, 1)
        if share > 1:
            times = tuple(t / share for t in self.arrivals)
            return Trace(arrivals=times, prompts=self.prompts, generated=self.generated)
        kept = [i for i in range(len(self)) if int((i + 1) * share + phase) > int(i * share + phase)]
        return self._of(kept)

    def part(self, start: int, count: int) -> Trace:
        """So many requests from one on, beginning at 0."""
        if not 0 <= start < len(self) or count < 1:
            raise DataError(f"requests {start} to {start + count} are not in a trace of {len(self)}")
        return self._of(range(start, min(start + count, len(self))))

    def _of(self, kept: Sequence[int]) -> Trace:
        return Trace(
            arrivals=tuple(self.arrivals[i] - self.arrivals[kept[0]] for i in kept),
            prompts=tuple(self.prompts[i] for i in kept),
            generated=tuple(self.generated[i] for i in kept),
        )


def traces_folder() -> Path:
    """The folder of the traces.

    Raises:
        DataError: `FOVEATE_DATA` is not set, or has no folder `traces`.
    """
    root = os.environ.get("FOVEATE_DATA")
    if not root:
        raise DataError("the traces are needed: set FOVEATE_DATA to a folder with traces/ in it (docs/benchmarks.md)")
    folder = Path(root) / "traces"
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    return folder


def read_trace(file: Path) -> Trace:
    """Read a trace from its CSV file; raises `DataError` if it is not one."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            rows = [
                (datetime.fromisoformat(row["TIMESTAMP"][:26]), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
                for row in csv.DictReader(opened)
            ]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file} is not a trace with TIMESTAMP, ContextTokens and GeneratedTokens: {error}") from error
    rows.sort(key=lambda row: row[0])
    if not rows:
        raise DataError(f"{file} has no requests")
    return Trace(
        arrivals=tuple((when - rows[0][0]).total_seconds() for when, _, _ in rows),
        prompts=tuple(max(1, prompt) for _, prompt, _ in rows),
        generated=tuple(max(1, generated) for _, _, generated in rows),
    )
