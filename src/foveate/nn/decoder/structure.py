"""What a decoder of transformers is made of, found by its structure: the blocks as the op `decoder_blocks` takes them.

Names of modules and attributes are those that transformers' decoders share. A model that has anything else (another
module in a block, another activation, a norm that computes something else) is not recognized, and a sentence says why.
Norms and activations are recognized by what they compute. Whether the whole does what the model does is seen when it
first runs: see `foveate.nn.decoder.fused`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from foveate.kernels.decoder.numbers import (
    ACTIVATIONS,
    NO_NORM,
    RMS_NORM,
    RMS_NORM_ONE_PLUS,
    Constants,
    Numbers,
)
from foveate.kernels.decoder.reference import Norm
from foveate.nn.experts import PlaneExperts
from foveate.nn.modules import PlaneLinear

#: The norms of a block by the names of its modules, in the order of `decoder_handle`: of the input, of queries, of
#: keys, of attention's output, of the MLP's input and of its output.
_NORMS: Mapping[frozenset[str], tuple[str | None, str | None, str | None, str | None]] = {
    frozenset(("input_layernorm", "post_attention_layernorm")): (
        "input_layernorm",
        None,
        "post_attention_layernorm",
        None,
    ),
    frozenset(("post_attention_layernorm", "post_feedforward_layernorm")): (
        None,
        "post_attention_layernorm",
        None,
        "post_feedforward_layernorm",
    ),
    frozenset(
        ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    ): (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
_ACTIVATION_NAMES = ("act_fn", "activation_fn")


class NotRecognized(Exception):
    """Why a module is no decoder that can be fused, in a sentence."""


@dataclass(frozen=True, eq=False)
class Block:
    """A block of a decoder.

    Attributes:
        groups: its linear layers, those that share an input together: q, k and v; the output; gate and up; down. A
            mixture has no more than the first two.
        norms: its six norms; None where there is none.
        norm_kinds: what each computes.
        numbers, constants: as `decoder_handle` takes them.
        router: of a mixture.
        experts: the two linear layers of each expert.
    """

    groups: tuple[tuple[PlaneLinear, ...], ...]
    norms: tuple[nn.Module | None, ...]
    norm_kinds: tuple[tuple[int, float], ...]
    numbers: Numbers
    constants: Constants
    router: nn.Module | None
    experts: tuple[tuple[PlaneLinear, PlaneLinear], ...]


@dataclass(frozen=True, eq=False)
class Structure:
    """A decoder.

    Attributes:
        blocks: its blocks.
        last: its last norm.
        last_kind: what that computes.
        width: the model width.
        rotary_size: how much of a head is turned.
        tables: the kinds of blocks that have angles of their own; None for the one kind of most models.
        windows: how many positions blocks of each kind see, 0 for all; the kind is None where no kinds are named.
    """

    blocks: tuple[Block, ...]
    last: nn.Module
    last_kind: tuple[int, float]
    width: int
    rotary_size: int
    tables: tuple[str | None, ...]
    windows: Mapping[str | None, int]


def structure_of(base: nn.Module) -> Structure:
    """The structure of a decoder, such as `transformers.LlamaModel`; raises `NotRecognized`."""
    children = dict(base.named_children())
    layers, last = children.pop("layers", None), children.pop("norm", None)
    children.pop("embed_tokens", None)
    rotary = children.pop("rotary_emb", None)
    if not isinstance(layers, nn.ModuleList) or last is None or rotary is None:
        raise NotRecognized("it has no `layers`, `norm` and `rotary_emb`")
    if children:
        raise NotRecognized(f"it has further modules: {', '.join(children)}")
    config: Any = base.config
    tables = _tables(rotary, config)
    rotary_size = _rotary_size(rotary, tables[0])
    count = int(getattr(config, "num_hidden_layers", len(layers)))
    blocks = tuple(_block(layer, config, i, rotary_size, tables) for i, layer in enumerate(list(layers)[:count]))
    if not blocks:
        raise NotRecognized("it has no blocks")
    width = blocks[0].groups[0][0].weight.shape[1]
    kinds = getattr(config, "layer_types", None) or [None] * count
    windows = {kind: block.numbers.window for kind, block in zip(kinds, blocks, strict=False)}
    return Structure(blocks, last, _kind_of_norm(last, "norm"), width, rotary_size, tables, windows)


def angles(rotary: nn.Module, positions: Tensor, table: str | None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions [B, S], float32 [B, S, rotary size], of the kind of blocks that `table` names."""
    cosine, sine = rotary(torch.empty(0), positions, *(() if table is None else (table,)))
    return cosine.float(), sine.float()


def _rotary_size(rotary: nn.Module, table: str | None) -> int:
    """How much of a head is turned; raises `NotRecognized` where rotary positions are not tables of angles."""
    try:
        cosine, sine = angles(rotary, torch.zeros(1, 1, dtype=torch.int64), table)
    except Exception as error:  # whatever a module of another kind makes of these arguments
        raise NotRecognized(f"its rotary positions are not tables of angles: {error!r}") from error
    if cosine.dim() != 3 or cosine.shape != sine.shape or cosine.shape[-1] % 2:
        raise NotRecognized("its rotary positions are not tables of angles")
    return cosine.shape[-1]


def _tables(rotary: nn.Module, config: Any) -> tuple[str | None, ...]:
    kinds = getattr(rotary, "layer_types", None)
    if kinds is None:
        return (None,)
    own = set(getattr(config, "layer_types", ()))
    return tuple(sorted(own & set(kinds))) or (None,)


def _block(layer: nn.Module, config: Any, number: int, rotary_size: int, tables: tuple[str | None, ...]) -> Block:
    children = {name: own for name, own in layer.named_children() if not isinstance(own, nn.Dropout)}
    attention, mlp = children.pop("self_attn", None), children.pop("mlp", None)
    names = _NORMS.get(frozenset(children))
    if attention is None or mlp is None or names is None:
        raise NotRecognized(f"block {number} is made of {', '.join(sorted(dict(layer.named_children())))}")
    own = dict(attention.named_children())
    query_norm, key_norm = own.pop("q_norm", None), own.pop("k_norm", None)
    groups: tuple[tuple[PlaneLinear, ...], ...] = _linears(
        own, (("q_proj", "k_proj", "v_proj"), ("qkv_proj",)), ("o_proj",), f"block {number}"
    )
    projections = groups[:2]
    inner = dict(mlp.named_children())
    mixture = None
    if isinstance(inner.get("experts"), PlaneExperts):
        mixture = _mixture(inner, number)
        kind = mixture.activation
    else:
        own_act = next((inner.pop(name) for name in _ACTIVATION_NAMES if name in inner), getattr(mlp, "act_fn", None))
        groups += _linears(inner, (("gate_proj", "up_proj"), ("gate_up_proj",)), ("down_proj",), f"block {number}")
        kind = _kind_of_activation(own_act, number)
    for part in (layer, attention, mlp):
        if any(True for _ in part.parameters(recurse=False)):
            raise NotRecognized(f"block {number} has parameters outside of its layers and norms")
    head_size = int(getattr(attention, "head_dim", 0))
    kv_rows = projections[0][1].weight.shape[0] if len(projections[0]) > 1 else 0
    queries = projections[1][0].weight.shape[1]
    if not head_size or queries % head_size:
        raise NotRecognized(f"block {number} has heads of unknown size")
    if not kv_rows:
        kv_rows = (projections[0][0].weight.shape[0] - queries) // 2
    heads, kv_heads = queries // head_size, kv_rows // head_size
    before, after, mlp_before, mlp_after = (None if name is None else children[name] for name in names)
    norms = (before, query_norm, key_norm, after, mlp_before, mlp_after)
    whole = query_norm is not None and cast(Tensor, query_norm.weight).numel() == queries != head_size
    turned = bool(getattr(attention, "use_rope", True))
    return Block(
        groups=groups,
        norms=norms,
        norm_kinds=tuple((NO_NORM, 0.0) if n is None else _kind_of_norm(n, f"a norm of block {number}") for n in norms),
        numbers=Numbers(
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            rotary_size=rotary_size if turned else 0,
            rotary_table=0 if tables[0] is None else tables.index(config.layer_types[number]),
            window=_window(attention, config, number),
            whole_norms=int(whole),
            activation=kind,
            experts=0 if mixture is None else len(mixture.experts),
            top_k=0 if mixture is None else mixture.top_k,
            normalized=0 if mixture is None else mixture.normalized,
        ),
        constants=Constants(
            scale=float(attention.scaling),  # type: ignore[arg-type]
            cap=float(getattr(attention, "attn_logit_softcapping", None) or 0.0),
            residual=float(getattr(layer, "residual_multiplier", 1.0)),
        ),
        router=None if mixture is None else mixture.router,
        experts=() if mixture is None else mixture.experts,
    )


@dataclass(frozen=True, eq=False)
class _Mixture:
    router: nn.Module
    experts: tuple[tuple[PlaneLinear, PlaneLinear], ...]
    top_k: int
    normalized: int
    activation: int


@torch.no_grad()
def _mixture(children: dict[str, nn.Module], number: int) -> _Mixture:
    """The mixture of a block, whose router and gate are recognized by what they compute."""
    where = f"the mixture of block {number}"
    layer, router = cast(PlaneExperts, children["experts"]), children.get("gate")
    if set(children) != {"experts", "gate"} or router is None:
        raise NotRecognized(f"{where} has further modules: {', '.join(sorted(children))}")
    weight, top_k = getattr(router, "weight", None), getattr(router, "top_k", None)
    alone = not list(router.children()) and len(router._parameters) == 1 and not any(True for _ in router.buffers())
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not isinstance(top_k, int) or not alone:
        raise NotRecognized(f"the router of block {number} is {type(router).__name__}, which is not one weight")
    x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    try:
        _, scores, _ = router.forward(x)
    except Exception as error:  # whatever a router of another kind does
        raise NotRecognized(
            f"the router of block {number}, {type(router).__name__}, is not known: {error!r}"
        ) from error
    shares = torch.softmax(x.float() @ weight.float().t(), -1).topk(top_k).values
    near = 1e-4 if weight.dtype == torch.float32 else 3e-2
    found = [
        n for n, own in enumerate((shares, shares / shares.sum(-1, keepdim=True))) if _near(scores.float(), own, near)
    ]
    experts = [layer._modules[str(i)] for i in range(layer.num_experts)]
    pairs = [(expert._modules.get("gate_up_proj"), expert._modules.get("down_proj")) for expert in experts if expert]
    origin: Any = layer.origin
    if not found or getattr(origin, "has_post_expert_norm", False):
        raise NotRecognized(f"{where} weighs its experts in another way")
    for pair in pairs:
        for one in pair:
            if not isinstance(one, PlaneLinear) or one.bias is not None:
                raise NotRecognized(f"{where} has experts that are not two layers on planes without biases")

    def gated(y: Tensor) -> Tensor:
        if hasattr(origin, "_apply_gate"):
            return cast(Tensor, origin._apply_gate(y))
        gate, up = y.chunk(2, dim=-1)
        return cast(Tensor, up * origin.act_fn(gate))

    y = torch.linspace(-6, 6, 64).flip(0)[None] * torch.tensor([[1.0], [0.7]])
    gate, up = y.chunk(2, -1)
    kinds = [kind for kind, (_, of) in enumerate(ACTIVATIONS) if _near(gated(y), of(gate) * up, 1e-6)]
    if not kinds:
        raise NotRecognized(f"{where} gates its experts in another way")
    return _Mixture(router, cast("Any", tuple(pairs)), top_k, found[-1], kinds[0])


def _linears(
    children: dict[str, nn.Module], first: Sequence[tuple[str, ...]], second: tuple[str, ...], where: str
) -> tuple[tuple[PlaneLinear, ...], tuple[PlaneLinear, ...]]:
    """The linear layers of a part of a block: those of one of the names of `first`, and those of `second`."""
    for names in first:
        if set(children) == {*names, *second}:
            made = [children[name] for name in (*names, *second)]
            for name, layer in zip((*names, *second), made, strict=True):
                if not isinstance(layer, PlaneLinear):
                    raise NotRecognized(f"{name} of {where} is not on planes but {type(layer).__name__}")
            linears = cast("list[PlaneLinear]", made)
            return tuple(linears[: len(names)]), tuple(linears[len(names) :])
    raise NotRecognized(f"{where} has layers {', '.join(sorted(children))}")


def _window(attention: nn.Module, config: Any, number: int) -> int:
    """How many positions a query of a block sees; 0 for all."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is not None:
        if kinds[number] not in ("full_attention", "sliding_attention"):
            raise NotRecognized(f"block {number} has an attention of kind {kinds[number]}")
        return int(window) if window and kinds[number] == "sliding_attention" else 0
    own = getattr(attention, "sliding_window", window)
    return int(own) if own else 0


@torch.no_grad()
def _kind_of_norm(norm: nn.Module, what: str) -> tuple[int, float]:
    """What a norm computes, and its epsilon; seen from what it makes of a few random rows."""
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if (
        not isinstance(weight, Tensor)
        or not isinstance(eps, float)
        or list(norm.children())
        or len(norm._parameters) > 1
    ):
        raise NotRecognized(f"{what} is {type(norm).__name__}, which is not one weight and an epsilon")
    x = torch.randn(3, weight.numel(), generator=torch.Generator().manual_seed(0)) * 2
    got = norm.forward(x.to(weight.dtype)).float()
    for kind in (RMS_NORM, RMS_NORM_ONE_PLUS):
        expected = Norm(kind, weight.float(), eps).of(x.to(weight.dtype).float())
        if _near(got, expected, 1e-5 if weight.dtype == torch.float32 else 2e-2):
            return kind, eps
    raise NotRecognized(f"{what} is {type(norm).__name__}, which is not an RMS norm")


@torch.no_grad()
def _kind_of_activation(activation: Any, number: int) -> int:
    x = torch.linspace(-6, 6, 97)
    if callable(activation):
        got = activation(x)
        for kind, (_, expected) in enumerate(ACTIVATIONS):
            if isinstance(got, Tensor) and _near(got, expected(x), 1e-6):
                return kind
    raise NotRecognized(f"block {number} has an activation of class {type(activation).__name__}")


def _near(got: Tensor, expected: Tensor, error: float) -> bool:
    return got.shape == expected.shape and float((got - expected).norm()) <= error * float(expected.norm())
