"""Attention's output and the logarithms of its sums are computed again, from the rounded queries, keys and values.

Fused attention keeps no probabilities: its backward makes them from logits, P = exp(scale q k^T - lse). With q and k
rounded and lse as it was, the rows of P do not sum to 1. An error of a logit is a factor of P, exp(s^2 / 2) on average
where its deviation is s: for the few tokens with large logits, at 2 bits, gradients came out half as large again. And
the output, which backward subtracts its own way (rowsum(dO * O)), had to be kept in 16 bits, or it cancelled nothing.

With lse' and O' of the same rounded q, k and v, backward gives the exact gradient of attention at those values: rows
sum to 1, and what is subtracted is what is there. Attention's forward runs once more, and O takes no memory but for a
layer after it that multiplies by a weight, which keeps its own few bits of it.

    B batch, H heads, Q queries, K keys, D width of a head
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.activations.forms.encodings import Computed
from foveate.activations.measure.scope import Call
from foveate.activations.recompute.recipes import Source, laid_out

#: The torch function whose calls these are.
ATTENTION = "scaled_dot_product_attention"
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class Attended:
    """One call of attention, to be run again from what is stored of its arguments.

    Args:
        inputs: in the order in which autograd saves them: the mask, if there is one, keys [B, H, K, D], queries
            [B, H, Q, D] and values [B, H, K, D].
        causal, scale: as attention was called.
        read: the tensor of a source.
    """

    def __init__(
        self, inputs: tuple[Source, ...], causal: bool, scale: float | None, read: Callable[[Source], Tensor]
    ) -> None:
        self.inputs, self._causal, self._scale, self._read = inputs, causal, scale, read
        self._other: tuple[int, Tensor] | None = None

    def run(self, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The output [B, H, Q, D], and the logarithm of each row's sum [B, H, Q]."""
        *mask, k, q, v = inputs
        results: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, self._causal, attn_mask=mask[0] if mask else None, scale=self._scale
        )
        return results

    def result(self, which: int) -> Tensor:
        """The output or the logarithms. Backward asks for both, one after the other: attention runs once."""
        other, self._other = self._other, None
        if other is not None and other[0] == which:
            return other[1]
        with torch.no_grad():
            results = self.run([self._read(source) for source in self.inputs])
        self._other = (1 - which, results[1 - which])
        return results[which]


@dataclass(frozen=True)
class Again(Computed):
    """A result of attention that is computed again: a form that holds nothing.

    Attributes:
        attended: the call.
        which: 0 the output, 1 the logarithms of sums.
        stride: of the result as it was saved; how it comes out depends on how its arguments lie in memory.
    """

    attended: Attended
    which: int
    stride: tuple[int, ...]

    @property
    def roots(self) -> tuple[Any, ...]:
        """The payloads that it is computed from."""
        return tuple(source.item for source in self.attended.inputs[-3:])

    def values(self) -> Tensor:
        """The values, [n], in the order in which they lay in memory."""
        result = laid_out(self.attended.result(self.which), self.stride)
        return result.as_strided((result.numel(),), (1,), result.storage_offset())


class Attentions:
    """Which saved tensors are results of attention that can be computed again.

    Whether attention run again gives what was saved is looked at, to the bit, where it is first called: what runs is
    the kernel for CPUs, and which kernel ran is not said. Others keep what they saved.

    Args:
        read: the tensor of a source.
    """

    def __init__(self, read: Callable[[Source], Tensor]) -> None:
        self._read = read
        self._agrees: dict[tuple[str, int, torch.dtype], bool] = {}

    def form(self, call: Call, tensor: Tensor) -> Again | None:
        """How a tensor that a call of attention saves is computed again; None if it is not.

        Args:
            call: with the tensors that it has saved before.
            tensor: as it is saved.
        """
        given: dict[str, Any] = {**dict(zip(_ARGUMENTS, call.args, strict=False)), **call.kwargs}
        count = 3 if given.get("attn_mask") is None else 4
        inputs = tuple(call.packed)
        if tensor.device.type != "cpu" or given.get("dropout_p") or not len(inputs) == count < len(call.tensors):
            return None
        k, q, v = call.tensors[count - 3 : count]
        shapes = ((*q.shape[:-1], v.shape[-1]), tuple(q.shape[:-1]))
        if not _fit(q, k, v) or tuple(tensor.shape) not in shapes:
            return None
        which = shapes.index(tuple(tensor.shape))
        if call.again is None:
            call.again = Attended(inputs, bool(given.get("is_causal")), given.get("scale"), self._read)
        key = (call.frame.module, call.occurrence, q.dtype)
        if key not in self._agrees:
            with torch.no_grad():
                made = call.again.run([saved.detach() for saved in call.tensors[:count]])[which]
            self._agrees[key] = made.dtype == tensor.dtype and torch.equal(made, tensor.detach())
        return Again(call.again, which, tensor.stride()) if self._agrees[key] else None


def are_sums(call: Call, tensor: Tensor) -> bool:
    """Whether a tensor can be the logarithms of sums a fused kernel saves, [B, H, *], not probabilities."""
    first = call.tensors[-2] if len(call.tensors) > 1 else tensor
    return tensor.dim() == 3 and first.dim() == 4 and tensor.shape[0] == first.shape[0]


def _fit(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether they can be queries, keys and values: as wide as one another, and so many heads a group."""
    return (
        q.dim() == k.dim() == v.dim() == 4
        and k.shape == v.shape
        and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
        and q.shape[1] % k.shape[1] == 0
    )
