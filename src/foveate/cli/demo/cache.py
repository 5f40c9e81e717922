"""The demo's trained model, kept for the next time: one safetensors file for each recipe and version of Python."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from foveate.cli.demo.corpus import Corpus
from foveate.cli.demo.training import Progress, Recipe, Trained, new_model, train
from foveate.errors import CheckpointError
from foveate.files.kept_model import keep_model, kept_path, restore_model
from foveate.kernels.backends.cpu.compiled import cache_folder


def default_cache() -> Path:
    """`foveate/demo` under the user's cache folder."""
    return cache_folder() / "demo"


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
    path = kept_path(cache, "llama", identity)
    model = new_model(recipe)
    if path.exists():
        try:
            about = restore_model(model, path, identity)
            return Trained(model.eval(), True, **about)
        except CheckpointError as error:
            notice(f"{error}; training anew")
    result = train(model, recipe, text, watch)
    try:
        about = {name: value for name, value in vars(result).items() if name not in ("model", "cached")}
        keep_model(result.model, path, identity, about)
    except OSError as error:
        notice(f"the trained model could not be kept for next time: {error}")
    return result
