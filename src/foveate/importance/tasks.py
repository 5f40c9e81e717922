"""Task profiles: the importance that a task had, kept in a file, and which of several tasks the stream is like now.

A file is a safetensors file: for each weight its mean, as in `Rolling.means`, and as metadata the task's name, its
tokens and a SHA-256 over all of it. It is written under a temporary name and renamed, so a kill leaves the last whole
file. It holds statistics of inputs, no weights and no text.

Which task it is: each task has a chain of equal bytes. The divergence of each on a sample of the stream changes its
share (Fixed-Share: Herbster and Warmuth, 1998). A small part of every share is given to all others, so that a task that
was bad for long can return soon.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save
from torch import Tensor

from foveate.errors import CheckpointError, DataError
from foveate.files import TensorFile, checksum, parse_json, replacing
from foveate.importance.rolling import Rolling

_KIND = "foveate task profile 1"
_LONGEST_NAME = 200


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskProfile:
    """The importance of one task.

        task = tracker.task("code")
        fv.save_task("code.safetensors", task)
        fv.track_importance(model, tasks=[fv.load_task("code.safetensors")])

    Attributes:
        name: what the task is called, 1 to 200 printable characters.
        means: for each weight f A (`foveate.importance.rolling`), float64 [1, G] or [NT, 1].
        tokens: how many tokens it was seen in.

    Raises:
        DataError: the name is not such a text, `tokens` is negative, or a mean is not finite or is negative.
    """

    name: str
    means: Mapping[str, Tensor]
    tokens: int

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not 0 < len(self.name) <= _LONGEST_NAME or not self.name.isprintable():
            raise DataError(f"name (={self.name!r}) of a task is not a printable text of 1 to {_LONGEST_NAME} letters")
        if type(self.tokens) is not int or self.tokens < 0:
            raise DataError(f"tokens (={self.tokens!r}) of task {self.name} is not a whole number from 0 on")
        for weight, mean in self.means.items():
            if mean.dim() != 2 or not bool(torch.isfinite(mean).all()) or bool((mean < 0).any()):
                raise DataError(f"task {self.name}: the mean of {weight} is not a finite table of numbers from 0 on")
        object.__setattr__(self, "means", MappingProxyType(dict(self.means)))


def task_of(name: str, state: Rolling) -> TaskProfile:
    """The importance of a stream so far, as the profile of a task."""
    return TaskProfile(name=name, means=state.means(), tokens=state.tokens)


def save_task(path: str | os.PathLike[str], task: TaskProfile) -> None:
    """Write a task profile. The file is complete or as it was before, also after a kill.

    Raises:
        CheckpointError: it cannot be written.
    """
    tensors = {name: mean.double().contiguous() for name, mean in task.means.items()}
    metadata = {"kind": _KIND, "name": task.name, "tokens": str(task.tokens), "sha256": _digest(task, tensors)}
    content = save(tensors, metadata=metadata)
    try:
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise CheckpointError(f"the task profile {path} cannot be written: {error}") from error


def load_task(path: str | os.PathLike[str]) -> TaskProfile:
    """Read a task profile.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not a task profile, or is damaged.
    """
    with TensorFile(Path(path)) as file:
        if file.metadata.get("kind") != _KIND:
            raise CheckpointError(f"{path} is not a task profile")
        tensors = {name: file.read(name) for name in file.entries}
        try:
            tokens = parse_json(file.metadata["tokens"].encode())
            task = TaskProfile(name=file.metadata["name"], means=tensors, tokens=tokens)
        except (DataError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        if file.metadata.get("sha256") != _digest(task, tensors):
            raise CheckpointError(f"{path} is damaged: its checksum does not match")
    return task


def means_for(task: TaskProfile, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The means of a task, which must be of this model."""
    for name, mean in task.means.items():
        if name not in means or mean.shape != means[name].shape:
            raise DataError(f"task {task.name} is of another model: {name} {list(mean.shape)} is not followed here")
    return dict(task.means)


def _digest(task: TaskProfile, tensors: Mapping[str, Tensor]) -> str:
    parts = [[name, list(t.shape), checksum(t)] for name, t in sorted(tensors.items())]
    return hashlib.sha256(json.dumps([task.name, task.tokens, parts]).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How fast shares follow losses.

    Attributes:
        rate: a candidate of loss 1 loses a factor of e to this power against one of loss 0 at each step.
        switch: the part of all shares that is divided among all candidates at each step, 0 to 1.

    Raises:
        DataError: a value is out of its range.
    """

    rate: float = 4.0
    switch: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf:
            raise DataError(f"rate (={self.rate!r}) is not a positive finite number")
        if not 0 <= self.switch <= 1:
            raise DataError(f"switch (={self.switch!r}) is not from 0 to 1")


def start_shares(names: tuple[str, ...]) -> dict[str, float]:
    """Equal shares."""
    return dict.fromkeys(names, 1 / len(names))


def update_shares(shares: Mapping[str, float], divergences: Mapping[str, float], sharing: Sharing) -> dict[str, float]:
    """One step of Fixed-Share. Shares stay positive (if `switch` is) and sum to 1.

    Args:
        shares: those before.
        divergences: of each candidate on the same sample; one that is not finite counts as the worst. They are scaled
            to 0 for none and 1 for the greatest, so that only their ratios count.
        sharing: the rates.
    """
    known = {name: divergences.get(name, math.inf) for name in shares}
    finite = [max(value, 0.0) for value in known.values() if math.isfinite(value)]
    worst = max(finite, default=0.0)
    losses = {
        name: (max(value, 0.0) / worst if worst > 0 else 0.0) if math.isfinite(value) else 1.0
        for name, value in known.items()
    }
    weighted = {name: share * math.exp(-sharing.rate * losses[name]) for name, share in shares.items()}
    total = sum(weighted.values())
    if total <= 0:
        return start_shares(tuple(shares))
    each = sharing.switch / len(shares)
    return {name: (1 - sharing.switch) * value / total + each for name, value in weighted.items()}
