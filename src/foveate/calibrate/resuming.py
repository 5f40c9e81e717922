"""The file that a calibration is resumed from: its statistics, checked when they are read.

It is a safetensors file whose metadata hold a version, the objective, and a SHA-256 of everything in it. Beside the
statistics it holds a sample of the model's weights and of the first batch, so that a file of another model or of other
data is refused. The samples are compared within a tolerance, since merging adapters can change the last bits of
weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from foveate.collect.objectives import Objective
from foveate.collect.sums import RANGES
from foveate.errors import CheckpointError, DataError
from foveate.files import TensorFile, checksum, replacing
from foveate.memory.available import free_memory
from foveate.sizes import format_bytes

_VERSION = "3"
_SAMPLE = "foveate sample"
#: How many values of each tensor the sample has.
_VALUES = 64
_TOLERANCE = 1e-3
#: Statistics that may be negative, and statistics whose diagonal alone must not be negative.
_SIGNED = RANGES | {"input moments"}
_SQUARE = frozenset({"covariance_KK", "gradients_BRR"})


def sample_of(model: nn.Module, batch: Any) -> Tensor:
    """Numbers that distinguish a model and its data from others, float64 [S]."""
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    found = [*model.state_dict(keep_vars=True).values(), *leaves]
    parts = []
    for tensor in (t.detach() for t in found if isinstance(t, Tensor) and not t.is_meta):
        flat = tensor.reshape(-1)
        every = max(1, flat.numel() // _VALUES)
        values = flat[::every][:_VALUES]
        values = values.abs() if values.is_complex() else values
        parts += [torch.tensor([float(n) for n in (tensor.dim(), *tensor.shape)]), values.cpu()]
    return torch.cat([part.double() for part in parts]) if parts else torch.zeros(0, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class ResumeFile:
    """A file that keeps the statistics of a calibration.

    Attributes:
        path: where it is, or will be.
        objective: what the outputs of the model are for.
        sample: what distinguishes the model and its data (`sample_of`).
    """

    path: Path
    objective: Objective
    sample: Tensor

    def at(self, path: Path) -> ResumeFile:
        """A file of the same calibration at another path."""
        return replace(self, path=path)

    def delete(self) -> None:
        """Delete the file, if there is one."""
        self.path.unlink(missing_ok=True)

    def write(self, state: Mapping[str, Tensor]) -> None:
        """Write the statistics so far (`Collector.state`), atomically.

        Raises:
            DataError: the file cannot be written.
        """
        tensors = {key: t.contiguous() for key, t in state.items()}
        tensors[_SAMPLE] = self.sample
        about = {"foveate_resume": _VERSION, "objective": type(self.objective).__name__}
        about["sha256"] = _digest(about, {key: checksum(t) for key, t in tensors.items()})
        try:
            with replacing(self.path) as temporary:
                save_file(tensors, temporary, about)
        except (OSError, SafetensorError) as error:
            raise DataError(f"the resume file {self.path} cannot be written: {error}") from error

    def read(self) -> dict[str, Tensor]:
        """The statistics in the file, for `Collector.restore`.

        Raises:
            DataError: it is damaged, of another version, or of another model, objective, or other data.
        """
        path, sample = self.path, self.sample
        try:
            with TensorFile(path) as file:
                if file.bytes > free_memory():
                    raise CheckpointError(f"{format_bytes(file.bytes)}, and {format_bytes(free_memory())} are free")
                about = dict(file.metadata)
                tensors = {name: file.read(name) for name in file.entries}
        except (CheckpointError, FileNotFoundError) as error:
            raise DataError(f"the resume file {path} cannot be read ({error}): delete it to start afresh") from error
        if about.get("foveate_resume") != _VERSION:
            raise DataError(f"the resume file {path} is of another version: delete it to start afresh")
        if about.pop("sha256", "") != _digest(about, {key: checksum(t) for key, t in tensors.items()}):
            raise DataError(f"the resume file {path} cannot be read (its checksum is wrong): delete it to start afresh")
        kept = tensors.pop(_SAMPLE, torch.zeros(0))
        same = kept.shape == sample.shape and kept.dtype == sample.dtype
        if not same or not torch.allclose(kept, sample, rtol=_TOLERANCE, atol=1e-6, equal_nan=True):
            raise DataError(
                f"the resume file {path} was made for another model or objective, or other data: "
                "delete it to start afresh"
            )
        if about.get("objective") != type(self.objective).__name__:
            raise DataError(
                f"the resume file {path} was made for another model or objective ({about.get('objective')}): "
                "delete it to start afresh"
            )
        for name, tensor in tensors.items():
            if not _makes_sense(name.rpartition("|")[2], tensor):
                raise DataError(
                    f"the resume file {path} cannot be read ({name} makes no sense): delete it to start afresh"
                )
        return tensors


def _digest(about: Mapping[str, str], checksums: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps([about, checksums], sort_keys=True).encode()).hexdigest()


def _makes_sense(key: str, tensor: Tensor) -> bool:
    """Whether sums of squares are not negative, counts are plausible, and all values are finite."""
    if not tensor.is_floating_point() or bool(tensor.isnan().any()):
        return False
    # the range of a module that was never reached goes from Inf to -Inf
    if key not in RANGES and not bool(tensor.isfinite().all()):
        return False
    if key in ("samples", "batches") and (tensor.dim() or not 0 <= float(tensor) < 1 << 53):
        return False
    if key in _SQUARE:
        return tensor.dim() >= 2 and bool((tensor.diagonal(dim1=-2, dim2=-1) >= 0).all())
    return key in _SIGNED or bool((tensor >= 0).all())
