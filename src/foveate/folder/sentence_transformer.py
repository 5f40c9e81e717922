"""A SentenceTransformer in a folder: its description in a head, and building it from one without its weights.

A SentenceTransformer is a transformers model, a tokenizer, and modules that make one vector of the model's outputs. The
head of a folder describes these modules by class and settings. Only the classes listed here are built from a head: no
name in it is imported, and nothing is fetched. A SentenceTransformer with other modules needs a skeleton,
`foveate.load(path, model=...)`.
"""

from __future__ import annotations

import importlib
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

from torch import nn

from foveate.errors import CheckpointError, MissingExtraError

#: The classes of modules that are built from a head, and the settings of each.
_SETTINGS = {
    "Transformer": {"transformer_task", "modality_config", "module_output_name"},
    "Pooling": {"embedding_dimension", "pooling_mode", "include_prompt"},
    "Normalize": {"module_input_name", "module_output_name"},
}
_TASK = "feature-extraction"
_OUTER = ("prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim")


def transformer_in(model: nn.Module) -> nn.Module | None:
    """The transformers model in a SentenceTransformer that can be built from a head; None for any other module."""
    if type(model).__name__ != "SentenceTransformer" or not type(model).__module__.startswith("sentence_transformers."):
        return None
    described = [_described(name, module) for name, module in model.named_children()]
    if None in described or [m["type"] for m in described if m is not None].count("Transformer") != 1:
        return None
    first = next(iter(model.children()))
    inner = getattr(first, "model", None)
    return inner if type(first).__name__ == "Transformer" and isinstance(inner, nn.Module) else None


def description(model: nn.Module) -> dict[str, Any]:
    """The description of a SentenceTransformer in a head, without that of its transformers model."""
    modules = [_described(name, module) for name, module in model.named_children()]
    return {"modules": modules, **{name: getattr(model, name) for name in _OUTER}}


def _described(name: str, module: Any) -> dict[str, Any] | None:
    """The name, class and settings of a module; None if it cannot be built from these alone."""
    kind = type(module)
    if kind.__name__ not in _SETTINGS or not kind.__module__.startswith("sentence_transformers."):
        return None
    described = {"name": name, "type": kind.__name__, "settings": module.get_config_dict()}
    return described if _is_described(described) else None


def _is_described(entry: Any) -> bool:
    """Whether an entry of a head is one that `_described` could have made."""
    if not isinstance(entry, dict) or set(entry) != {"name", "type", "settings"}:
        return False
    name, kind, settings = entry["name"], entry["type"], entry["settings"]
    if not isinstance(name, str) or (not name.isidentifier() and not name.isdecimal()):
        return False
    if not isinstance(kind, str) or kind not in _SETTINGS or not isinstance(settings, dict):
        return False
    if not set(settings) <= _SETTINGS[kind]:
        return False
    if kind != "Transformer":
        return True
    # other tasks are for images and sound, which have other processors
    return settings.get("transformer_task") == _TASK and set(settings.get("modality_config", ())) == {"text"}


def tokenizer_files(model: nn.Module) -> dict[str, bytes]:
    """The files of the present tokenizer of a SentenceTransformer, by name."""
    first: Any = next(iter(model.children()))
    with tempfile.TemporaryDirectory() as folder:
        first.processor.save_pretrained(folder)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.is_file()}


def assembled(inner: nn.Module, described: Any, folder: Path) -> nn.Module:
    """Build a SentenceTransformer around a transformers model that has no weights yet.

    Args:
        inner: the model, on the meta device.
        described: what `description` returned, as read from a head.
        folder: where the tokenizer's files are.

    Raises:
        MissingExtraError: sentence_transformers is not installed.
        CheckpointError: the description is malformed, or the installed release cannot build it.
    """
    try:
        library: Any = importlib.import_module("sentence_transformers")
        modules: Any = importlib.import_module("sentence_transformers.models")
    except ImportError as error:
        raise MissingExtraError(
            "rebuilding this model needs sentence_transformers: pip install sentence-transformers"
        ) from error
    listed = described.get("modules") if isinstance(described, dict) else None
    if not isinstance(listed, list) or not all(_is_described(entry) for entry in listed) or not listed:
        raise CheckpointError(f"{folder}: its head does not describe a SentenceTransformer")
    kinds = [entry["type"] for entry in listed]
    if kinds[0] != "Transformer" or kinds.count("Transformer") > 1:
        raise CheckpointError(f"{folder}: a SentenceTransformer begins with its one Transformer")

    class Given(modules.Transformer):  # type: ignore[misc]
        """The library's own module, except that it is given its model and does not read one from files."""

        def _load_config(self, *_: Any, **__: Any) -> tuple[Any, bool]:
            return inner.config, False

        def _load_model(self, *_: Any, **__: Any) -> nn.Module:
            return inner

    made: dict[str, nn.Module] = {}
    try:
        for entry in listed:
            if entry["type"] == "Transformer":
                options = {"local_files_only": True, "trust_remote_code": False}
                module = Given(str(folder), processor_kwargs=options, **entry["settings"])
                module.__class__ = modules.Transformer
            else:
                module = getattr(modules, entry["type"])(**entry["settings"])
            made[entry["name"]] = module
        outer = {name: described.get(name) for name in _OUTER}
        model: nn.Module = library.SentenceTransformer(
            modules=OrderedDict(made), device="meta", local_files_only=True, **outer
        )
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"{folder}: the SentenceTransformer in its head cannot be built ({error!r}): give the module to fill, "
            "load(path, model=SentenceTransformer(...))"
        ) from error
    return model
