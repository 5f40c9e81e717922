"""What the backward of each operation needs of the tensors that autograd saves for it.

    ReLU needs a sign, pooling a shape, cross-entropy its exact log-probabilities, a linear layer its input on average

A `Rule` describes one torch function.

**Need.** Saved tensors may lose bits where backward uses their values on average (`Need.VALUES`). Where backward only
asks whether values are within bounds, or for the shape, one bit per value or none is lossless. Others must stay exact
(`Need.EXACT`): weights, statistics, divisors, and values that backward compares with each other, such as a maximum's.

**Error.** `linear` marks functions whose backward is linear in the saved input and whose saved input reaches only the
gradient of the weight: their error has a closed form (`measure/closed_forms.py`). `curved` marks functions whose
backward is not linear in the saved tensor. Stochastic rounding is then biased, by 15 to 21 % at 2 bits (GELU,
LayerNorm) and a hundredth of that at 4 bits. A bias does not average out, so the error at 2 bits is multiplied by a
constant (`measure/ledger.py`). `unsteady` marks attention, where the effect of an error in a query differs several
times from batch to batch: its error is multiplied at all levels.

**Floor.** `floor` is the lowest level allowed. It is 16 for log-probabilities, on which everything after them
depends, and for reciprocal roots, of which a norm made of parts has one for a whole row. It is 4 for the arguments of
fused attention whose results are not computed again from them (`recompute/attention.py`).

A function without a rule stays exact until a probe has measured it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor


class Need(Enum):
    """What backward needs of a saved tensor."""

    VALUES = "values"
    #: Whether it is <= 0, and NaN is not.
    PASSES = "passes"
    #: Whether it is > 0, and NaN is not.
    POSITIVE = "positive"
    #: Whether it is within bounds.
    INSIDE = "inside"
    SHAPE = "shape"
    EXACT = "exact"
    #: The function's result, computed again from its stored arguments.
    RECOMPUTED = "recomputed"
    #: The same memory, which the function fills after autograd has saved it.
    LEAVE = "leave"


@dataclass(frozen=True)
class Bounds:
    """The interval in which the gradient of a function passes; `strict` excludes the bounds themselves."""

    low: float | None
    high: float | None
    strict: bool


@dataclass(frozen=True)
class Rule:
    """What one function's backward needs.

    Attributes:
        need: of the tensors that `exact` does not name.
        exact: positions or names of arguments whose saved copies stay exact: weights, masks, running statistics.
        linear: the closed form that holds for its one lossy tensor: `linear`, `conv` or none (measured by probes).
        curved: whether backward is not linear in what is saved.
        unsteady: whether the effect of an error differs much from batch to batch.
        power: whether it raises its first argument to its second.
        floor: the lowest level that may be chosen.
        smallest_share: saved tensors with fewer values than this share of the largest argument's are statistics (mean,
            reciprocal deviation, logsumexp), and exact.
        known: whether the function is in the table.
    """

    need: Need = Need.VALUES
    exact: tuple[int | str, ...] = ()
    linear: str = ""
    curved: bool = False
    unsteady: bool = False
    power: bool = False
    floor: int = 2
    smallest_share: float = 0.0
    known: bool = True


_LINEAR = Rule(exact=(1, "weight", 2, "bias"), linear="linear")
_CONV = Rule(exact=(1, "weight", 2, "bias"), linear="conv")
_BILINEAR = Rule()
#: Of products element by element: a factor with few values scales many values of the other.
_PRODUCT = Rule(smallest_share=1 / 16)
_CURVED = Rule(curved=True)
_NORM = Rule(curved=True, exact=(1, 2, 3, 4, "weight", "bias", "running_mean", "running_var"), smallest_share=0.5)
_SHAPE = Rule(Need.SHAPE)
_EXACT = Rule(Need.EXACT)
_ATTENTION = Rule(curved=True, unsteady=True, exact=(3, "attn_mask"), smallest_share=0.5)
#: The least level of the arguments of fused attention that is not computed again (`recompute/attention.py`).
FUSED_FLOOR = 4
_GUARDED = Rule(floor=16, curved=True, exact=(1, 2, "target", "weight"))

#: Losses, and functions that save only masks and indices.
_LOSSES = (
    *("nll_loss", "logsumexp", "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div", "ctc_loss"),
    *("l1_loss", "smooth_l1_loss", "huber_loss", "gaussian_nll_loss", "poisson_nll_loss", "hinge_embedding_loss"),
    *("margin_ranking_loss", "multi_margin_loss", "multilabel_margin_loss", "triplet_margin_loss"),
    *("cosine_embedding_loss", "soft_margin_loss", "multilabel_soft_margin_loss"),
    *("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
    *("embedding", "embedding_bag"),
)
#: Backward finds the selected values by comparing: a rounded value would be found nowhere, or in many places.
_SELECTING = (
    *("max", "min", "amax", "amin", "aminmax", "maximum", "minimum", "fmax", "fmin", "median", "nanmedian"),
    *("kthvalue", "cummax", "cummin", "scatter_reduce", "scatter_reduce_", "index_reduce", "index_reduce_"),
    *("segment_reduce", "norm", "renorm", "renorm_", "dist", "cdist", "abs", "abs_", "sign", "sgn", "threshold"),
    *("threshold_", "hardshrink", "softshrink", "where", "masked_fill", "masked_fill_"),
)
#: Backward divides by what is saved, or takes a root or a logarithm of it.
_SINGULAR = (
    *("div", "div_", "divide", "true_divide", "__truediv__", "__rtruediv__", "__itruediv__", "__rdiv__", "__div__"),
    *("reciprocal", "reciprocal_", "remainder", "fmod", "__mod__", "addcdiv", "addcdiv_", "prod", "cumprod"),
    *("log", "log_", "log2", "log2_", "log10", "log10_", "log1p", "log1p_", "logit", "logit_", "xlogy", "xlogy_"),
    *("sqrt", "sqrt_", "asin", "acos", "atanh", "acosh", "arcsin", "arccos", "arctanh", "arccosh", "asin_", "acos_"),
    *("atanh_", "acosh_", "atan2", "arctan2", "hypot", "erfinv", "erfinv_", "lgamma", "digamma", "polygamma"),
    *("mvlgamma", "logcumsumexp", "logaddexp", "logaddexp2", "std", "std_mean", "normalize", "cosine_similarity"),
    *("pairwise_distance", "local_response_norm", "cholesky", "cholesky_inverse", "cholesky_solve", "svd", "qr"),
    *("inverse", "pinverse", "det", "logdet", "slogdet", "triangular_solve", "lu", "ormqr", "geqrf", "lp_pool1d"),
    *("lp_pool2d", "lp_pool3d", "pdist", "nansum", "angle", "polar"),
)
_SINGULAR_FAMILIES = ("linalg_", "special_", "_linalg_")

#: The rule of a function that is not in the table.
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
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply"), _PRODUCT),
    **dict.fromkeys(("relu", "relu_"), Rule(Need.PASSES)),
    **dict.fromkeys(("leaky_relu", "leaky_relu_"), Rule(Need.POSITIVE)),
    **dict.fromkeys(("relu6", "hardtanh", "hardtanh_", "hardsigmoid"), Rule(Need.INSIDE)),
    **dict.fromkeys(("clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_"), Rule(Need.INSIDE)),
    **dict.fromkeys(("clamp_max", "clamp_max_"), Rule(Need.INSIDE)),
    **dict.fromkeys(("rrelu", "rrelu_"), Rule(Need.LEAVE)),
    **dict.fromkeys(
        (
            f"{kind}_pool{space}d{indices}"
            for kind in ("max", "avg", "adaptive_max", "adaptive_avg", "fractional_max")
            for space in (1, 2, 3)
            for indices in ("", "_with_indices")
        ),
        _SHAPE,
    ),
    **dict.fromkeys(
        ("gelu", "silu", "elu", "celu", "selu", "softplus", "mish", "hardswish", "sigmoid", "tanh"), _CURVED
    ),
    **dict.fromkeys(("square", "exp", "exp_", "sigmoid_", "tanh_", "softmax"), _CURVED),
    "rsqrt": Rule(curved=True, floor=16),
    **dict.fromkeys(("pow", "pow_", "__pow__", "__ipow__", "float_power"), Rule(curved=True, power=True)),
    **dict.fromkeys(("grid_sample", "grid_sampler", "grid_sampler_2d", "grid_sampler_3d"), Rule(exact=(1, "grid"))),
    **dict.fromkeys(("layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm"), _NORM),
    "scaled_dot_product_attention": _ATTENTION,
    "multi_head_attention_forward": Rule(curved=True, smallest_share=0.05),
    **dict.fromkeys(("log_softmax", "cross_entropy"), _GUARDED),
    **dict.fromkeys((*_LOSSES, *_SELECTING, *_SINGULAR), _EXACT),
}


def rule_of(function: str) -> Rule:
    """The rule of a torch function, by its `__name__`."""
    if function.startswith(_SINGULAR_FAMILIES):
        return _EXACT
    return RULES.get(function, UNKNOWN)


def bounds_of(function: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Bounds | None:
    """The bounds of a call whose rule is `Need.INSIDE`; None where they are tensors."""
    kind = function.rstrip("_")
    if kind in ("relu6", "hardsigmoid"):
        return Bounds(0.0, 6.0, True) if kind == "relu6" else Bounds(-3.0, 3.0, True)
    strict = kind == "hardtanh"
    names = {"hardtanh": ("min_val", "max_val"), "clamp_max": ("max",)}.get(kind, ("min", "max"))
    given = {**dict(zip(names, args[1:], strict=False)), **kwargs}
    low, high = given.get("min_val", -1.0 if strict else None), given.get("max_val", 1.0 if strict else None)
    low, high = given.get("min", low), given.get("max", high)
    if any(isinstance(bound, Tensor) for bound in (low, high)) or (low is None and high is None):
        return None
    return Bounds(low, high, strict)


def need_of(rule: Rule, tensor: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Need:
    """What backward needs of one tensor that a call saves.

    A tensor is an argument's if it shares its memory. One that is not differentiable and not the first argument is a
    constant (a mask, the cosines of a rotary embedding). It is kept exact, since its error would be the same in every
    step.
    """
    if rule.need is not Need.VALUES:
        return rule.need
    if rule.power and not (len(args) == 2 and isinstance(args[1], (int, float)) and args[1] >= 1):
        return Need.EXACT  # a power below 1 divides by what is saved; one that is a tensor takes its logarithm
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
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # what torch raises for them
        return None
