"""The log of a controller as JSON lines, and its replay bit for bit.

The first line is the setup, and each further line one observation with the decision that followed. Floats are written
with all their digits, and those that are not finite as strings, so the replay sees the very same numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from foveate.errors import DataError
from foveate.files import parse_json, read_regular
from foveate.runtime.controller import Decision, Observation, State, step
from foveate.runtime.limits import Limits
from foveate.runtime.policy import Costs, Policy, Setup
from foveate.runtime.readings import Reading

#: The version of the log's lines.
VERSION = 1
_LONGEST_LOG = 1 << 31


class Log:
    """A log that is being written, one line flushed after another, so that it can be read after a crash.

    Args:
        path: the file, which is replaced.
        setup: what the controller knows.
        index: the index at the start.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, setup: Setup, index: int) -> None:
        self._file: TextIO = path.open("w", encoding="utf-8")
        self._write({"version": VERSION, "setup": setup_to_json(setup), "index": index})

    def add(self, seen: Observation, decision: Decision) -> None:
        """Write one observation and its decision."""
        self._write({"seen": _observation_to_json(seen), "decision": decision_to_json(decision)})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(_encoded(line), allow_nan=False) + "\n")
        self._file.flush()


def replay(path: str | Path) -> tuple[Decision, ...]:
    """Decide again from the observations of a log, and compare every decision with the one that was made.

        with fv.RuntimeManager(model, limits=limits, options=ManagerOptions(log="run.jsonl")): ...
        decisions = replay("run.jsonl")

    Args:
        path: a log that `RuntimeManager` wrote. A last line that is cut off is left out.

    Returns:
        The decisions, in order.

    Raises:
        DataError: the file is not such a log, or a decision differs; the message names its line.
    """
    lines = _lines(Path(path))
    try:
        number, head = next(lines)
        if head["version"] != VERSION:
            raise DataError(f"{path} is a log of version {head['version']}, and this foveate reads {VERSION}")
        setup, state = setup_from_json(head["setup"]), State(index=int(head["index"]))
    except (StopIteration, KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} does not begin with the setup of a log ({error!r})") from error
    decisions = []
    for number, line in lines:
        try:
            seen, logged = _observation_from_json(line["seen"]), line["decision"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path}, line {number}: it is not an observation with a decision ({error!r})") from error
        state, decision = step(setup, state, seen)
        if _encoded(decision_to_json(decision)) != _encoded(logged):
            raise DataError(
                f"{path}, line {number}: index {decision.index} ({decision.reason}) was decided now, and the log says "
                f"{logged}"
            )
        decisions.append(decision)
    return tuple(decisions)


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    texts = read_regular(path, _LONGEST_LOG).split(b"\n")
    # what follows the last newline is a line that was cut off, or nothing
    for number, text in enumerate(texts[:-1], 1):
        try:
            yield number, _decoded(parse_json(text))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from error


def setup_to_json(setup: Setup) -> dict[str, Any]:
    """A setup as JSON."""
    return asdict(setup)


def setup_from_json(data: Mapping[str, Any]) -> Setup:
    """The inverse of `setup_to_json`; raises `DataError`, `BudgetError`, `TypeError` or `KeyError` for other data."""
    return Setup(
        limits=Limits(**data["limits"]),
        costs=Costs(**data["costs"]),
        policy=Policy(**data["policy"]),
        floor=data["floor"],
        frees_memory=data["frees_memory"],
    )


def decision_to_json(decision: Decision) -> dict[str, Any]:
    """A decision as JSON; its credit may be infinite."""
    return {**asdict(decision), "notes": list(decision.notes), "demands": [asdict(d) for d in decision.demands]}


def _observation_to_json(seen: Observation) -> dict[str, Any]:
    readings = {name: asdict(reading) for name, reading in seen.readings.items()}
    return {"now": seen.now, "readings": readings, "passes": seen.passes, "refused": seen.refused}


def _observation_from_json(data: Mapping[str, Any]) -> Observation:
    readings = {name: Reading(**reading) for name, reading in data["readings"].items()}
    return Observation(now=data["now"], readings=readings, passes=data["passes"], refused=data["refused"])


_NAMES = {"float:nan": math.nan, "float:inf": math.inf, "float:-inf": -math.inf}


def _encoded(value: Any) -> Any:
    """Floats that JSON has no numbers for become strings; tuples become lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"float:{value}"
    if isinstance(value, Mapping):
        return {str(key): _encoded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encoded(inner) for inner in value]
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, str):
        return _NAMES.get(value, value)
    if isinstance(value, dict):
        return {key: _decoded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_decoded(inner) for inner in value]
    return value
