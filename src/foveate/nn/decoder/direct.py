"""The pass of one token without what transformers' forward does around the decoder and the output layer.

Between the op of all blocks and the output layer a causal language model of transformers checks arguments, makes
dataclasses and calls modules: a fifth of a small model's token. Where its forward is nothing but the decoder and the
output layer, the two can be called by themselves. Whether it is that is not read from the code, but compared: after a
token of the usual way, the output layer is given the same hidden states, and must give the same logits to the bit. A
model that scales or caps its logits gives others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.nn.decoder.fused import FusedForward
from foveate.nn.fused_group import drop_left_open
from foveate.nn.passes import Passes


class DirectPass:
    """The pass of one token through a fused decoder and the output layer."""

    def __init__(self, model: nn.Module, decoder: FusedForward, head: nn.Module, passes: Passes) -> None:
        self._model, self._decoder, self._head, self._passes = model, decoder, head, passes
        self._is_known = False
        path = next(name for name, module in model.named_modules() if module is decoder.base).split(".")
        between = [model.get_submodule(".".join(path[:depth])) for depth in range(1, len(path))]
        self._modules = (model, *between, decoder.base, head)
        self._hooks = _hooks(self._modules)

    @classmethod
    def of(cls, model: Any) -> DirectPass | None:
        """That of a causal language model of transformers; None if it has no fused decoder, or hooks of others."""
        found = [m.__dict__["forward"] for m in model.modules() if isinstance(m.__dict__.get("forward"), FusedForward)]
        head = model.get_output_embeddings() if len(found) == 1 else None
        # no call of a group is open where blocks are one op, so none is dropped
        before = [hook for hook in model._forward_pre_hooks.values() if hook is not drop_left_open]
        begins = [getattr(hook, "__self__", None) for hook in before]
        ends = [getattr(hook, "__self__", None) for hook in model._forward_hooks.values()]
        if head is None or len(begins) != 1 or begins != ends or not isinstance(begins[0], Passes):
            return None
        made = cls(model, found[0], head, begins[0])
        # a forward put on the model itself does what its class does not
        return made if not any(made._hooks[2:]) and "forward" not in model.__dict__ else None

    def is_as(self, logits_BV: Tensor) -> bool:
        """Whether this pass may be used, given the logits that the model's own forward has just made for one token of
        each sequence: the output layer makes the same of the same hidden states. Compared once: a pass that was known,
        and yet was not made, will not be made again.
        """
        hidden = self._decoder.last_hidden
        known, self._is_known = self._is_known, False
        if hidden is not None and len(hidden) == len(logits_BV):
            self._is_known = torch.equal(self._logits(hidden), logits_BV)
        return self._is_known and not known

    def __call__(self, token_B1: Tensor, cache: Any) -> Tensor | None:
        """The logits [B, V] after one more token of each sequence; None where the model's own forward is needed."""
        changed = "forward" in self._model.__dict__ or _hooks(self._modules) != self._hooks
        if not self._is_known or changed:
            return None
        self._passes.begin(self._model, (), {"input_ids": token_B1})
        try:
            hidden = self._decoder.hidden_of(token_B1, cache)
            return None if hidden is None else self._of_head(hidden)
        finally:
            self._passes.end(self._model, None, None)

    def _logits(self, hidden_B1D: Tensor) -> Tensor:
        self._passes.begin(self._model, (), {"input_ids": hidden_B1D[..., 0].long()})
        try:
            return self._of_head(hidden_B1D)
        finally:
            self._passes.end(self._model, None, None)

    def _of_head(self, hidden_B1D: Tensor) -> Tensor:
        logits: Tensor = self._head(hidden_B1D)
        return logits[:, -1]


def _hooks(modules: Sequence[nn.Module]) -> list[int]:
    """How many hooks modules have, and how many there are for all modules of the process."""
    everywhere = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)
    each = [held for m in modules for held in (m._forward_hooks, m._forward_pre_hooks)]
    return [len(held) for held in (*each, *everywhere)]
