"""The quantizer that transformers calls while it loads a folder of foveate.

transformers builds the model on the meta device, calls `preprocess_model`, reads weights into it, gives values to what
it found none for, ties weights, and calls `postprocess_model`. Planes are no weights that it could read, and it would
fill them with random numbers. So between the two calls the model is an empty module: its parts are put aside, and
transformers finds nothing to load. Then `foveate.load` fills them.

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
from foveate.calibrate.dequantize import dequantize
from foveate.checkpoint import HEAD
from foveate.errors import CheckpointError, DeviceError
from foveate.folder.load import load
from foveate.folder.save import QUANT_METHOD

#: What a module consists of.
_PARTS = ("_modules", "_parameters", "_buffers")
#: What else transformers consults while it loads: weights that are tied, and keys that it is not to miss.
_ATTRIBUTES = ("all_tied_weights_keys", "_keys_to_ignore_on_load_unexpected")


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
    """What was taken out of a model while transformers loads it."""

    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)


class FoveateQuantizer(HfQuantizer):
    """Loads a folder of foveate in place of transformers."""

    requires_calibration = True  # `from_pretrained` quantizes nothing: that is `foveate.quantize`

    def __init__(self, quantization_config: FoveateConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
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
        config.transformers_weights = self.quantization_config.rest
        return config

    update_tp_plan = update_attn_implementation  # of releases before 5.20

    def _process_model_before_weight_loading(self, model: Any, *, checkpoint_files: list[str], **kwargs: Any) -> Any:
        self._folder = _whole_folder(Path(checkpoint_files[0]).parent, model.config)
        with checkpoint.opened(self._folder) as folder:
            _check_kind(model, folder)
        self._aside = _Aside(
            {part: dict(getattr(model, part)) for part in _PARTS}, {name: getattr(model, name) for name in _ATTRIBUTES}
        )
        for part in _PARTS:
            getattr(model, part).clear()
        model.all_tied_weights_keys = {}
        kind = set if isinstance(model._keys_to_ignore_on_load_unexpected, set) else list  # as the release has it
        model._keys_to_ignore_on_load_unexpected = kind([".*"])
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        assert self._folder is not None
        for part, held in self._aside.parts.items():
            getattr(model, part).update(held)
        for name, value in self._aside.attributes.items():
            setattr(model, name, value)
        self._aside = _Aside()
        return load(self._folder, model=model)

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        dequantize(model)
        return model if dtype is None else model.to(dtype)

    def is_serializable(self, **kwargs: Any) -> bool:
        """No: `foveate.save` stores planes."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through planes, which do not change: adapters can be trained."""
        return True


def _whole_folder(found: Path, config: Any) -> Path:
    """The folder in which transformers found a file; of a model on the hub all other files are fetched too."""
    commit = getattr(config, "_commit_hash", None)
    if (found / HEAD).is_file() or commit is None:
        return found
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(config.name_or_path, revision=commit, allow_patterns=["foveate*"]))


def _check_kind(model: nn.Module, folder: checkpoint.Folder) -> None:
    """Refuse a class that is not the one that was saved: names of its layers would be others."""
    head, kind = folder.head, type(model).__name__
    if "sentence_transformer" in head.model:
        raise CheckpointError(f"{folder.path} holds a SentenceTransformer: load it with foveate.load")
    saved = head.model.get("transformers")
    if saved != kind:
        raise CheckpointError(f"{folder.path} holds a {saved}, not a {kind}: load it as what it is")
