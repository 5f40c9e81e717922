"""What the backward of each operation needs of what autograd keeps for it.

    ReLU needs a sign, pooling a shape, cross-entropy its exact log-probabilities, a linear layer its input on average

A rule says, for one torch function, which saved tensors may lose bits (`Need.VALUES`), which are needed for their sign
or shape alone (`Need.SIGN`, `Need.SHAPE`: lossless at a bit or at nothing), and which must stay exact (`Need.EXACT`).
`linear` marks functions whose backward is linear in the saved input and reaches the gradient of the weight alone: their
error has a closed form (sensitivity.py). `curved` marks those whose backward is not linear in what is
saved: stochastic rounding is then biased, by 15 to 21 % at 2 bits (GELU, LayerNorm) and a hundredth of that at 4, and a
bias does not average out, so the error at 2 bits counts several times (ledger.py). `floor` is the least level on offer:
log-probabilities, on which everything after them depends, may go to 16 bits and no lower. A function without a rule is
treated with the greatest care: exact until a probe has measured it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor


class Need(Enum):
    """What backward needs of a saved tensor."""

    VALUES = "values"
    SIGN = "sign"
    SHAPE = "shape"
    EXACT = "exact"


@dataclass(frozen=True)
class Rule:
    """What one function's backward needs.

    Attributes:
        need: of the tensors that `exact` does not name.
        exact: positions or names of arguments whose saved copies stay exact: weights, masks, running statistics.
        linear: the closed form that holds for its one lossy tensor: `linear`, `conv` or none (measured by probes).
        curved: whether backward is not linear in what is saved.
        floor: the least level.
        smallest_share: saved tensors with fewer values than this share of the largest argument's are statistics (mean,
            reciprocal deviation, logsumexp), and exact.
        known: whether the function is in the table.
    """

    need: Need = Need.VALUES
    exact: tuple[int | str, ...] = ()
    linear: str = ""
    curved: bool = False
    floor: int = 2
    smallest_share: float = 0.0
    known: bool = True


_LINEAR = Rule(exact=(1, "weight", 2, "bias"), linear="linear")
_CONV = Rule(exact=(1, "weight", 2, "bias"), linear="conv")
_BILINEAR = Rule()
_CURVED = Rule(curved=True)
_NORM = Rule(curved=True, exact=(1, 2, 3, 4, "weight", "bias", "running_mean", "running_var"), smallest_share=0.5)
_SIGN = Rule(Need.SIGN)
_SHAPE = Rule(Need.SHAPE)
_EXACT = Rule(Need.EXACT)
_GUARDED = Rule(floor=16, curved=True, exact=(1, 2, "target", "weight"))

#: Of a function nothing is known about.
UNKNOWN = Rule(curved=True, smallest_share=0.05, known=False)

#: By the function's `__name__`.
RULES: Mapping[str, Rule] = {
    "linear": _LINEAR,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _CONV),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "bilinear"), Rule(exact=_CONV.exact)),
    **dict.fromkeys(
        ("addmm", "baddbmm", "matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "mv", "dot", "einsum", "addcmul"),
        _BILINEAR,
    ),
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply"), _BILINEAR),
    **dict.fromkeys(("relu", "relu_", "leaky_relu", "leaky_relu_"), _SIGN),
    **dict.fromkeys(
        (
            f"{kind}_pool{space}d{indices}"
            for kind in ("max", "avg", "adaptive_max", "adaptive_avg")
            for space in (1, 2, 3)
            for indices in ("", "_with_indices")
        ),
        _SHAPE,
    ),
    **dict.fromkeys(
        ("gelu", "silu", "elu", "celu", "selu", "softplus", "mish", "hardswish", "sigmoid", "tanh"), _CURVED
    ),
    **dict.fromkeys(("pow", "__pow__", "square", "exp", "sqrt", "rsqrt", "sigmoid_", "tanh_", "softmax"), _CURVED),
    **dict.fromkeys(("layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm"), _NORM),
    "scaled_dot_product_attention": Rule(curved=True, exact=(3, "attn_mask"), smallest_share=0.5),
    "multi_head_attention_forward": Rule(curved=True, smallest_share=0.05),
    **dict.fromkeys(("log_softmax", "cross_entropy"), _GUARDED),
    **dict.fromkeys(
        [
            "nll_loss",
            "logsumexp",
            "binary_cross_entropy",
            "binary_cross_entropy_with_logits",
            "kl_div",
            "ctc_loss",
            "dropout",
            "embedding",
            "embedding_bag",
        ],
        _EXACT,
    ),
}


def rule_of(function: str) -> Rule:
    """The rule of a torch function, by its `__name__`."""
    return RULES.get(function, UNKNOWN)


def need_of(rule: Rule, tensor: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Need:
    """What backward needs of one tensor that a call saves.

    A tensor is an argument's if it shares its memory. One that is not differentiable and not the first argument is a
    constant (a mask, the cosines of a rotary embedding): it is kept exact, since it would carry one error through all
    steps.
    """
    if rule.need is not Need.VALUES:
        return rule.need
    storage = tensor.untyped_storage()._cdata

    def holds(argument: Any) -> bool:
        return isinstance(argument, Tensor) and _storage_of(argument) == storage

    for which in rule.exact:
        if isinstance(which, str):
            if which in kwargs and holds(kwargs[which]):
                return Need.EXACT
        elif which < len(args) and holds(args[which]):
            return Need.EXACT
    if rule.smallest_share:
        largest = max((a.numel() for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), default=0)
        if tensor.numel() < rule.smallest_share * largest:
            return Need.EXACT
    return Need.VALUES


def _storage_of(tensor: Tensor) -> int | None:
    """The storage's address, or None of tensors that have none (sparse ones, subclasses)."""
    return _quiet(lambda: int(tensor.untyped_storage()._cdata))


def _quiet(read: Callable[[], int]) -> int | None:
    try:
        return read()
    except (NotImplementedError, RuntimeError):
        return None
