"""fuse: run the blocks of a decoder in one op, where they are recognized."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from torch import nn

from foveate.kernels.backends.table import Backend, ensure_loaded
from foveate.kernels.backends.table import backends as backends_of_devices
from foveate.nn.decoder.fused import FusedForward
from foveate.nn.decoder.structure import NotRecognized, structure_of
from foveate.nn.plane_module import PlaneModule
from foveate.nn.registry import registry_of


@dataclass(frozen=True, kw_only=True)
class Fused:
    """A decoder inside a model, and whether its blocks run as one op.

    Attributes:
        name: of the decoder in the model; empty for the model itself.
        blocks: how many blocks it has.
        fused: whether they run as one op.
        reason: why, in a sentence.
    """

    name: str
    blocks: int
    fused: bool
    reason: str


def fuse(model: nn.Module) -> tuple[Fused, ...]:
    """Run all blocks of the decoders in a quantized model in one op each, where they are recognized.

    `foveate.load` does it by itself. The blocks of transformers' decoders (Llama, Mistral, Qwen, Gemma, Phi, OLMo,
    SmolLM and others) are recognized by their structure. Before its first fused call a decoder compares the op with its
    own forward on a few random tokens. Calls that need what lies between blocks (gradients, hooks, adapters, hidden
    states, other caches) run block by block, as before, and so do compiled ones.

        fv.fuse(model)
        model.generate(**inputs)

    Args:
        model: a quantized model, or one that holds a quantized model.

    Returns:
        What became of each decoder, as `foveate.backends(model)` says it later.

    Raises:
        FoveateError: the model is not quantized.
    """
    registry_of(model)
    for _, module in _decoders(model):
        if "forward" in module.__dict__ or ensure_loaded().isa is None:
            continue
        made = FusedForward(module)
        with suppress(NotRecognized):
            made.structure  # noqa: B018  looks for it
            module.__dict__["forward"] = made
    return _fused(model)


def unfuse(model: nn.Module) -> None:
    """Run the decoders in a model block by block, whatever is called; undoes `fuse`."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), FusedForward):
            del module.__dict__["forward"]


def backends(model: nn.Module | None = None) -> tuple[Backend, ...] | tuple[Fused, ...]:
    """The backends of each device; or of a model, which of its decoders run as one op.

        fv.backends()
        fv.backends(model)

    Args:
        model: a quantized model.

    Returns:
        For each device of the table what there is for it: which backend runs, and why the others do not. At most one
        backend of a device runs. Of a model, one entry for each decoder of transformers in it.
    """
    return backends_of_devices() if model is None else _fused(model)


def _decoders(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that hold blocks as transformers' decoders do: they have `layers`, and planes below them."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module._modules.get("layers"), nn.ModuleList)
        and type(module).__module__.startswith("transformers.models.")
        and any(isinstance(m, PlaneModule) for m in module.layers.modules())
    ]


def _fused(model: nn.Module) -> tuple[Fused, ...]:
    found = []
    for name, module in _decoders(model):
        count = len(module.layers)  # type: ignore[arg-type]
        own = module.__dict__.get("forward")
        if isinstance(own, FusedForward):
            reason = own.reason or "all blocks are one op, where a call asks for nothing between them"
            found.append(Fused(name=name, blocks=count, fused=not own.reason, reason=reason))
            continue
        try:
            structure_of(module)
            reason = "it was not asked for (foveate.fuse)" if ensure_loaded().isa else "there are no compiled kernels"
        except NotRecognized as error:
            reason = str(error)
        found.append(Fused(name=name, blocks=count, fused=False, reason=reason))
    return tuple(found)
