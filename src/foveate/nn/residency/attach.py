"""make_resident: a live model gets the registry that lets its planes come and go."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from foveate.checkpoint import Tiers
from foveate.errors import FoveateError
from foveate.memory.streaming import StreamingResidency
from foveate.nn.registry import attach, detach, quantized_part, registry_of
from foveate.nn.residency.pass_gate import EagerHook
from foveate.nn.residency.registry import ResidentRegistry


def make_resident(model: nn.Module, residency: StreamingResidency, tiers: Tiers, *, strict: bool) -> ResidentRegistry:
    """Give a model whose weights have gaps the registry that lets its planes come and go.

    Args:
        model: a quantized model.
        residency: its runs.
        tiers: the folder that it came from.
        strict: whether calls wait for planes that are not in memory.
    """
    registry = ResidentRegistry.of(model, residency, tiers, strict=strict)
    detach(model)
    attach(model, registry)

    registry.hooks = [
        model.register_forward_pre_hook(EagerHook(registry.begin_pass), prepend=True),
        model.register_forward_hook(EagerHook(registry.end_pass), always_call=True),
        model.register_state_dict_pre_hook(_refuse_state),
        model.register_load_state_dict_pre_hook(_refuse_state),
    ]
    return registry


def _refuse_state(*_: Any) -> NoReturn:
    raise FoveateError(
        "a model whose planes are partly on disk has no state_dict: save it with foveate.save, or load its folder "
        "without memory="
    )


def resident_registry(model: nn.Module) -> ResidentRegistry:
    """The registry of a model whose planes come and go; raises `FoveateError` if all of its planes are in memory."""
    registry = registry_of(quantized_part(model))
    if not isinstance(registry, ResidentRegistry):
        raise FoveateError("all planes of this model are in memory: load it with foveate.load(path, memory=...)")
    return registry
