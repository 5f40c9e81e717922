"""Adapters of peft on a quantized model: float matrices that train beside planes that do not change.

    config = for_planes(LoraConfig(target_modules=["q_proj", "v_proj"]), model)
    model = peft.get_peft_model(model, config)

peft knows torch's own layers. A configuration made here tells it of layers on planes as well. Everything else, its
folders included, is as peft does it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from foveate.errors import FoveateError, MissingExtraError
from foveate.nn.modules import PlaneLinear
from foveate.nn.plane_module import PlaneModule
from foveate.nn.registry import quantized_part

if TYPE_CHECKING:
    from peft import LoraConfig

#: Values of `init_lora_weights` that do not change the weight of the layer.
_INITS = (True, False, "gaussian")


def for_planes(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """Let a configuration of LoRA adapters apply to linear layers on planes.

    Args:
        config: of plain LoRA; it is changed and returned. One that peft saved, `PeftConfig.from_pretrained(folder)`,
            needs this too, before `PeftModel.from_pretrained(model, folder, config=config)`.
        model: the quantized model that the adapters are for; it is not changed.

    Raises:
        MissingExtraError: peft is not installed.
        FoveateError: the model is not quantized, or the configuration asks for what planes cannot do: layers found by
            class (`target_modules="all-linear"`), training of layers on planes (`modules_to_save`), or a variant of
            LoRA or an initialization that reads or changes the dense weight.

    Example:
        >>> config = for_planes(peft.LoraConfig(target_modules=["q_proj", "v_proj"]), model)
        >>> adapted = peft.get_peft_model(model, config)
    """
    try:
        from foveate.adapters.lora import LoraOnPlanes
    except ImportError as error:
        raise MissingExtraError("adapters on planes need peft: pip install peft") from error

    names = [name for name, module in quantized_part(model).named_modules() if isinstance(module, PlaneModule)]
    if config.target_modules == "all-linear":
        raise FoveateError(
            "target_modules (='all-linear') finds torch's own layers only: name the layers, as in "
            'target_modules=["q_proj", "v_proj"]'
        )
    for wanted in config.modules_to_save or ():
        held = [name for name in names if _is_in(wanted, name)]
        if held:
            raise FoveateError(
                f"modules_to_save (={wanted!r}) would train {held[0]}, which is on planes: leave it float with "
                "quantize(..., skip=...)"
            )
    if config.init_lora_weights not in _INITS:
        raise FoveateError(
            f"init_lora_weights (={config.init_lora_weights!r}) needs the dense weight: on planes it is one of "
            f"{', '.join(map(repr, _INITS))}"
        )
    mapping: dict[type[nn.Module], Any] = {PlaneLinear: LoraOnPlanes}
    config._register_custom_module(mapping)
    return config


def _is_in(wanted: str, name: str) -> bool:
    """Whether the module `name` is one that peft selects by the end of its name, `wanted`, or lies within one."""
    return f".{wanted}." in f".{name}."
