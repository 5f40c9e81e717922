"""Attention's output and log-sum-exp are computed again, from the rounded queries, keys and values.

Fused attention saves no probabilities. Its backward computes them from logits and the saved log-sum-exp (lse):
P = exp(scale q k^T - lse), as in FlashAttention (Dao et al. 2022). If q and k are rounded and lse is not, the rows of P
do not sum to 1. An error of standard deviation s in a logit multiplies P by exp(s^2 / 2) on average. For the few tokens
with large logits, gradients at 2 bits were measured 1.5 times too large. The output O had to be stored in 16 bits,
since backward subtracts rowsum(dO * O), which must cancel.

If lse and O are computed again from the rounded q, k and v, backward gives the exact gradient of attention at those
values: the rows sum to 1, and the sum cancels. The forward of attention runs once more, and O takes no memory of its
own. A linear layer that follows stores its own rounded copy of O.

    B batch, H heads, Q queries, K keys, D width of a head
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.activations.forms.encodings import Recomputed
from foveate.activations.measure.scope import Call
from foveate.activations.recompute.recipes import StoredView, laid_out

#: The torch function whose calls these are.
ATTENTION = "scaled_dot_product_attention"
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class AttentionCall:
    """One call of attention, to be run again from its stored arguments.

    Args:
        inputs: in the order in which autograd saves them: the mask, if there is one, keys [B, H, K, D], queries
            [B, H, Q, D] and values [B, H, K, D].
        causal, scale: as attention was called.
        read: unpacks a stored view.
    """

    def __init__(
        self, inputs: tuple[StoredView, ...], causal: bool, scale: float | None, read: Callable[[StoredView], Tensor]
    ) -> None:
        self.inputs, self._causal, self._scale, self._read = inputs, causal, scale, read
        self._unread: tuple[int, Tensor] | None = None

    def run(self, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The output [B, H, Q, D], and the log-sum-exp of each row [B, H, Q]."""
        *mask, k, q, v = inputs
        results: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, self._causal, attn_mask=mask[0] if mask else None, scale=self._scale
        )
        return results

    def result(self, which: int) -> Tensor:
        """The output (0) or the log-sum-exp (1). Backward asks for one and then the other, and attention runs once."""
        unread, self._unread = self._unread, None
        if unread is not None and unread[0] == which:
            return unread[1]
        with torch.no_grad():
            results = self.run([self._read(view) for view in self.inputs])
        self._unread = (1 - which, results[1 - which])
        return results[which]


@dataclass(frozen=True)
class RecomputedAttention(Recomputed):
    """The encoding of a result of attention that is computed again; it stores no values.

    Attributes:
        call: the call of attention.
        which: 0 for the output, 1 for the log-sum-exp.
        stride: of the result as it was saved; that of a second result depends on how its arguments lie in memory.
    """

    call: AttentionCall
    which: int
    stride: tuple[int, ...]

    @property
    def roots(self) -> tuple[Any, ...]:
        """The payloads that it is computed from."""
        return tuple(view.item for view in self.call.inputs[-3:])

    def values(self) -> Tensor:
        """The values, [n], in the order in which they lay in memory."""
        result = laid_out(self.call.result(self.which), self.stride)
        return result.as_strided((result.numel(),), (1,), result.storage_offset())


class AttentionRecomputation:
    """Finds saved tensors that are results of attention and can be computed again.

    The second run uses torch's fused kernel for CPUs, and torch does not say which kernel the model ran. So at the
    first call of each site the two results are compared, bit for bit. Where they differ, the saved tensor is stored.

    Args:
        read: unpacks a stored view.
    """

    def __init__(self, read: Callable[[StoredView], Tensor]) -> None:
        self._read = read
        self._agrees: dict[tuple[str, int, torch.dtype], bool] = {}

    def encoding(self, call: Call, tensor: Tensor) -> RecomputedAttention | None:
        """The encoding of a result that a call of attention saves; None if it cannot be computed again.

            Args:
        XX: as it is saved.
        """
        given: dict[str, Any] = {**dict(zip(_ARGUMENTS, call.args, strict=False)), **call.kwargs}
        count = 3 if given.get("attn_mask") is None else 4
        inputs = tuple(call.packed)
        if tensor.device.type != "cpu" or given.get("dropout_p") or not len(inputs) == count < len(call.tensors):
            return None
        k, q, v = call.tensors[count - 3 : count]
        shapes = ((*q.shape[:-1], v.shape[-1]), tuple(q.shape[:-1]))
        if not _are_queries_keys_values(q, k, v) or tuple(tensor.shape) not in shapes:
            return None
        which = shapes.index(tuple(tensor.shape))
        if call.attention is None:
            call.attention = AttentionCall(inputs, bool(given.get("is_causal")), given.get("scale"), self._read)
        key = (call.frame.module, call.occurrence, q.dtype)
        if key not in self._agrees:
            with torch.no_grad():
                made = call.attention.run([saved.detach() for saved in call.tensors[:count]])[which]
            self._agrees[key] = made.dtype == tensor.dtype and torch.equal(made, tensor.detach())
        return RecomputedAttention(call.attention, which, tensor.stride()) if self._agrees[key] else None


def may_be_logsumexp(call: Call, tensor: Tensor) -> bool:
    """Whether a tensor can be the log-sum-exp that a fused kernel saves, [B, H, *], and not probabilities."""
    first = call.tensors[-2] if len(call.tensors) > 1 else tensor
    return tensor.dim() == 3 and first.dim() == 4 and tensor.shape[0] == first.shape[0]


def _are_queries_keys_values(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether shapes are those of queries, keys and values: one width, and whole groups of query heads."""
    return (
        q.dim() == k.dim() == v.dim() == 4
        and k.shape == v.shape
        and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
        and q.shape[1] % k.shape[1] == 0
    )
