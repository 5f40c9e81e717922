"""A model that was trained once and is kept for the next time: one safetensors file, named by what decided it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from foveate.errors import CheckpointError
from foveate.files.atomic import replacing


def kept_path(folder: Path, name: str, identity: str) -> Path:
    """The file in a folder for the model of this name that this identity decided."""
    return folder / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.safetensors"


def keep_model(model: nn.Module, path: Path, identity: str, about: Mapping[str, Any]) -> None:
    """Write the state of a model, whole or not at all.

    Args:
        model: the model.
        path: of `kept_path`.
        identity: everything that decided what it learnt, as text.
        about: what else to keep, as JSON has it.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
    metadata = {"identity": identity, "about": json.dumps(dict(about)), "sha256": _checksum(tensors)}
    with replacing(path) as temporary:
        temporary.write_bytes(save(tensors, metadata=metadata))


def restore_model(model: nn.Module, path: Path, identity: str) -> dict[str, Any]:
    """Load the state that `keep_model` wrote into a model of the same shape.

    Returns:
        What else was kept.

    Raises:
        CheckpointError: the file cannot be read, was altered, or is of another identity.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"the kept model {path} cannot be read ({error})") from error
    if metadata.get("identity") != identity or metadata.get("sha256") != _checksum(tensors):
        raise CheckpointError(f"the kept model {path} was altered since it was written")
    model.load_state_dict(tensors)
    about: dict[str, Any] = json.loads(metadata["about"])
    return about


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
