"""Requests of a recorded trace, scaled to a server: prompts by one factor, arrivals by another.

The Azure LLM inference traces of 2023 are CSV files with the columns TIMESTAMP, ContextTokens, GeneratedTokens. The
environment variable `FOVEATE_DATA` names the folder that has them in `traces/`.

Source: Patel et al., Splitwise, ISCA 2024; github.com/Azure/AzurePublicDataset.
"""

from __future__ import annotations

import csv
import os
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

    def at_rate(self, rate: float) -> Trace:
        """The same requests at another mean rate, in requests a second: all times are stretched alike."""
        span = self.arrivals[-1]
        stretch = (len(self) - 1) / rate / span if span > 0 else 1.0
        return Trace(arrivals=tuple(t * stretch for t in self.arrivals), prompts=self.prompts, generated=self.generated)

    def part(self, start: int, count: int) -> Trace:
        """So many requests from one on, beginning at 0."""
        if not 0 <= start < len(self) or count < 1:
            raise DataError(f"requests {start} to {start + count} are not in a trace of {len(self)}")
        first = self.arrivals[start]
        cut = slice(start, start + count)
        return Trace(
            arrivals=tuple(t - first for t in self.arrivals[cut]),
            prompts=self.prompts[cut],
            generated=self.generated[cut],
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
