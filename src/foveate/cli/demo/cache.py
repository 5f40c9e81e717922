"""The demo's trained model, kept for the next time: one safetensors file for each recipe and version of Python."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from foveate.cli.demo.corpus import Corpus
from foveate.cli.demo.training import Progress, Recipe, Trained, new_model, train
from foveate.errors import CheckpointError
from foveate.files import replacing


def default_cache() -> Path:
    """`foveate/demo` under the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foveate" / "demo"


def trained(
    recipe: Recipe,
    text: Corpus,
    cache: Path,
    *,
    watch: Callable[[Progress], None],
    notice: Callable[[str], None],
) -> Trained:
    """The recipe's model: from the cache, or trained now and put there.

    Args:
        recipe: what to train.
        text: what to train on.
        cache: the folder that keeps trained models.
        watch: called after every step of training.
        notice: told, in a sentence, of a cached file that cannot be used or written.
    """
    identity = json.dumps({"recipe": asdict(recipe), "python": sys.version_info[:3]}, sort_keys=True)
    path = cache / f"llama-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.safetensors"
    model = new_model(recipe)
    if path.exists():
        try:
            return _restored(model, path, identity)
        except CheckpointError as error:
            notice(f"{error}; training anew")
    result = train(model, recipe, text, watch)
    try:
        _keep(result, path, identity)
    except OSError as error:
        notice(f"the trained model could not be kept for next time: {error}")
    return result


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _keep(result: Trained, path: Path, identity: str) -> None:
    tensors = {name: t.detach().contiguous() for name, t in result.model.state_dict().items()}
    about = {
        "seconds": result.seconds,
        "steps": result.steps,
        "bytes_seen": result.bytes_seen,
        "threads": result.threads,
        "products": result.products,
    }
    content = save(tensors, metadata={"identity": identity, "about": json.dumps(about), "sha256": _checksum(tensors)})
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _restored(model: nn.Module, path: Path, identity: str) -> Trained:
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"the kept model {path} cannot be read ({error})") from error
    if metadata.get("identity") != identity or metadata.get("sha256") != _checksum(tensors):
        raise CheckpointError(f"the kept model {path} was altered since it was written")
    model.load_state_dict(tensors)
    return Trained(model.eval(), True, **json.loads(metadata["about"]))
