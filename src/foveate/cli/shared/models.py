"""Models and tokenizers by folder or hub name. transformers loads them and never runs code of a repository."""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import foveate as fv
from foveate.checkpoint import HEAD
from foveate.cli.shared.console import log
from foveate.errors import CheckpointError, DataError, MissingExtraError

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def transformers() -> Any:
    """The package transformers, with its log messages and progress bars switched off."""
    try:
        package: Any = import_module("transformers")
    except ImportError as error:
        raise MissingExtraError('this command needs transformers: pip install "foveate[cli]"') from error
    package.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        package.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return package


def _is_hub_name(name: str) -> bool:
    words = name.split("/")
    return len(words) <= 2 and all(words) and not name.startswith((".", "~"))


def config_of(name: str) -> Any:
    """The configuration of a local folder, or of a model on the hub.

    Raises:
        CheckpointError: there is no such folder, or no configuration in it.
        DataError: transformers does not know this kind of model.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CheckpointError(f"{name} holds no config.json: it is not a transformers model")
    if not folder.exists() and not _is_hub_name(name):
        raise CheckpointError(f"there is no folder {name}")
    if folder.is_file():
        raise CheckpointError(f"{name} is a file, not a model's folder")
    try:
        return transformers().AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        what = "" if folder.is_dir() else "there is no such folder here, and the hub answered: "
        raise CheckpointError(f"cannot read the model {name}: {what}{_first_line(error)}") from error


def original_config(name: str) -> Any:
    """As `config_of`, for an original model; raises `CheckpointError` for a folder that foveate wrote."""
    if (Path(name) / HEAD).is_file():
        raise CheckpointError(f"{name} was written by foveate: give the original model")
    return config_of(name)


def is_causal(config: Any) -> bool:
    """Whether the model predicts the next token, judged by the architectures that its configuration names."""
    return any("CausalLM" in name or "LMHead" in name for name in config.architectures or ())


def load_original(name: str) -> nn.Module:
    """The model in float32 with its head, of the class that its configuration names, or else of `AutoModel`.

    Raises:
        CheckpointError: there is no such model, or it has no weights.
        DataError: the model needs other inputs than token ids.
    """
    config = original_config(name)
    package = transformers()
    named = [getattr(package, architecture, None) for architecture in config.architectures or ()]
    models = [one for one in named if isinstance(one, type) and issubclass(one, package.PreTrainedModel)]
    kind: Any = models[0] if models else package.AutoModel
    log.info("loading %s", name)
    try:
        model = cast(nn.Module, kind.from_pretrained(name, dtype=torch.float32).eval())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load the model {name}: {_first_line(error)}") from error
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64))
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(
            f"{name}: a {type(model).__name__} does not run on token ids alone ({_first_line(error)}): "
            "use foveate.quantize in Python"
        ) from error
    return model


def load_planes(path: Path, keep: fv.PrecisionMap | int | None = None, memory: str | None = None) -> nn.Module:
    """Load a model that `foveate quantize` wrote; the arguments are those of `foveate.load`."""
    fv.read_head(path)
    transformers()
    return fv.load(path, keep=keep, memory=memory)


def load_tokenizer(name: str, instead: str = "give token ids with --tokens FILE.npy or .safetensors") -> Any:
    """The model's tokenizer.

    Raises:
        DataError: there is no tokenizer; the message says what to do `instead`.
    """
    folder = Path(name)
    if folder.is_dir() and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise DataError(f"{name} holds no tokenizer: {instead}")
    try:
        return transformers().AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"cannot load the tokenizer of {name}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
