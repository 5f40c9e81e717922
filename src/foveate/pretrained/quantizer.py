"""The quantizer that transformers calls while it loads a folder of foveate.

transformers builds the model on the meta device, calls `preprocess_model`, reads weights into it, gives values to what
it found none for, ties weights, and calls `postprocess_model`. Planes are no weights that it could read, and it would
fill them with random numbers. So between the two calls the model is an empty module: its parts are put aside, and
transformers finds nothing to load. Then `foveate.load` fills them. What transformers has written on the model for its
quantizers is taken off again: they would refuse what can be done with a model on planes.

The folder has no file of a name that transformers looks for, on purpose: without this quantizer `from_pretrained`
fails, where otherwise it would warn and return random weights. The quantizer names a file of the folder instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from foveate import checkpoint
from foveate.checkpoint import HEAD
from foveate.checkpoint.head import DATA_FILE, DTYPES
from foveate.errors import CheckpointError, DeviceError, FoveateError
from foveate.folder.load import load
from foveate.folder.save import QUANT_METHOD
from foveate.progress import log

#: What a module consists of.
_PARTS = ("_modules", "_parameters", "_buffers")
#: What else transformers consults while it loads: weights that are tied, and keys that it is not to miss.
_ATTRIBUTES = ("all_tied_weights_keys", "_keys_to_ignore_on_load_unexpected")
#: What transformers writes on a model and on its configuration for its quantizers.
_MARKS = ("hf_quantizer", "quantization_method", "is_quantized", "_is_hf_initialized")
_CONFIG_MARKS = ("quantization_config", "transformers_weights", "_is_quantized", "_pre_quantization_dtype")


def register() -> None:
    """Make the quantizer known to transformers, unless it is."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(FoveateConfig)
        register_quantizer(QUANT_METHOD)(FoveateQuantizer)


@dataclass
class FoveateConfig(QuantizationConfigMixin):
    """The entry `quantization_config` of a folder's `config.json`. The folder's own head says all the rest.

    Attributes:
        quant_method: the name of the quantizer.
        rest: the name of the file that holds what is not on planes.
    """

    quant_method: str = QUANT_METHOD
    rest: str = ""


@dataclass
class _Aside:
    """What is taken out of a model, and off it, while transformers loads it."""

    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)


class FoveateQuantizer(HfQuantizer):
    """Loads a folder of foveate in place of transformers."""

    def __init__(self, quantization_config: FoveateConfig, *, pre_quantized: bool = True, **kwargs: Any) -> None:
        if not pre_quantized:
            raise FoveateError(
                "from_pretrained quantizes nothing: load the model without quantization_config, and give it to "
                "foveate.quantize"
            )
        super().__init__(quantization_config, pre_quantized=True, **kwargs)
        self._folder: Path | None = None
        self._aside = _Aside()

    def update_device_map(self, device_map: Any) -> Any:
        """The CPU, for which there are kernels.

        Raises:
            DeviceError: another device was asked for.
        """
        if device_map is None:
            return None
        if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
            return {"": torch.device("cpu")}
        asked = device_map.values() if isinstance(device_map, dict) else [device_map]
        for device in asked:
            if str(device).partition(":")[0] != "cpu":
                raise DeviceError(f"device_map (={device_map!r}): foveate has kernels for the CPU only so far")
        return device_map

    def update_attn_implementation(self, config: Any) -> Any:
        """The call with the configuration before transformers looks for a file of weights: tells it of one."""
        rest = self.quantization_config.rest
        if not isinstance(rest, str) or not DATA_FILE.fullmatch(rest):  # it is joined to the folder's path
            raise CheckpointError(f"quantization_config: rest (={rest!r}) is not the name of a file of foveate's")
        config.transformers_weights = rest
        return config

    update_tp_plan = update_attn_implementation  # of releases before 5.20

    def _process_model_before_weight_loading(self, model: Any, *, checkpoint_files: list[str], **kwargs: Any) -> Any:
        self._folder = _whole_folder(Path(checkpoint_files[0]).parent)
        with checkpoint.opened(self._folder) as folder:
            folder.part("rest")  # transformers opens it too, and its message would not say which file is damaged
            _check_kind(model, folder)
        self._aside = _Aside(
            {part: dict(getattr(model, part)) for part in _PARTS}, {name: getattr(model, name) for name in _ATTRIBUTES}
        )
        for part in _PARTS:
            getattr(model, part).clear()
        model.all_tied_weights_keys = {}
        kind = set if isinstance(model._keys_to_ignore_on_load_unexpected, set) else list  # as the release has it
        model._keys_to_ignore_on_load_unexpected = kind([".*"])
        model._is_hf_initialized = True  # else transformers would initialize parts that are not there
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        assert self._folder is not None
        for part, held in self._aside.parts.items():
            getattr(model, part).update(held)
        for name, value in self._aside.attributes.items():
            setattr(model, name, value)
        self._aside = _Aside()
        for owner, names in ((model, _MARKS), (model.config, _CONFIG_MARKS)):
            for name in names:
                owner.__dict__.pop(name, None)
        with checkpoint.opened(self._folder) as folder:
            _keep_dtype(model.config, folder)
        return load(self._folder, model=model)

    def is_serializable(self, **kwargs: Any) -> bool:
        """No: `foveate.save` stores planes."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through planes, which do not change: adapters can be trained."""
        return True


def _keep_dtype(config: Any, folder: checkpoint.Folder) -> None:
    """Say in the configuration what was saved, whatever dtype was asked for."""
    held = next(iter(folder.head.dtype.values()), None)
    if held is not None and str(config.dtype) != f"torch.{held}":
        log.warning("%s: values stay %s, as they were saved; dtype (=%s) is not taken", folder.path, held, config.dtype)
    saved = folder.head.model["config"].get("dtype")
    config.dtype = getattr(torch, saved) if isinstance(saved, str) and saved in DTYPES else None


def _whole_folder(found: Path) -> Path:
    """The folder in which transformers found a file; what a model on the hub has besides is fetched to its cache."""
    # cache / models--owner--name / snapshots / commit
    caches = (p for p in (found, *found.parents) if p.parent.name == "snapshots")
    snapshot = next((p for p in caches if p.parent.parent.name.startswith("models--")), None)
    if snapshot is None or _is_whole(found):
        return found
    from huggingface_hub import snapshot_download

    repository = snapshot.parent.parent
    within = found.relative_to(snapshot).as_posix()
    snapshot_download(
        "/".join(repository.name.split("--")[1:]),
        revision=snapshot.name,
        cache_dir=repository.parent,
        allow_patterns=["foveate*" if within == "." else f"{within}/foveate*"],
    )
    return found


def _is_whole(path: Path) -> bool:
    if not (path / HEAD).is_file():
        return False
    return all((path / file).is_file() for file in checkpoint.read_head(path).files.values())


def _check_kind(model: nn.Module, folder: checkpoint.Folder) -> None:
    """Refuse a class that is not the one that was saved: names of its layers would be others."""
    head, kind = folder.head, type(model).__name__
    if "sentence_transformer" in head.model:
        raise CheckpointError(f"{folder.path} holds a SentenceTransformer: load it with foveate.load")
    saved = head.model.get("transformers")
    if saved != kind:
        raise CheckpointError(f"{folder.path} holds a {saved}, not a {kind}: load it as what it is")
