"""FusedForward: the forward of a decoder of transformers, which runs all its blocks in one op where it can.

It stands in the place of `forward` on the decoder itself (`model.model` of a causal language model). A call is fused
if nothing asks for what lies between the blocks: no gradients, no hooks on the blocks or their layers, no adapters, no
attentions or hidden states; a cache that the op can read and write; padding on the left, if any. Every other call, and
every compiled one, is that of the decoder's own class.

Before its first fused call it compares both ways on a few random tokens, once. A decoder of which they differ stays as
it is: its blocks compute something that their structure does not tell.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from foveate.kernels.decoder.numbers import GROUPS, NO_NORM
from foveate.nn.decoder import agreement
from foveate.nn.decoder.caches import Room, room_in, scratch
from foveate.nn.decoder.masks import OtherMask, first_positions
from foveate.nn.decoder.pages import ARGUMENTS, is_paged, pages_of
from foveate.nn.decoder.seen import Seen
from foveate.nn.decoder.structure import Block, NotRecognized, Structure, angles, structure_of
from foveate.nn.linear_call import LinearCall
from foveate.nn.plane_module import NO_BIAS
from foveate.nn.weight import PlaneWeight

_NONE = torch.empty(0)
#: Arguments of a decoder's forward that a fused call knows, and what it cannot put out.
_CACHES = ("cache", "past_key_values")  # the second in older releases of transformers
_KNOWN = frozenset(
    ("input_ids", "attention_mask", "position_ids", *_CACHES, "inputs_embeds", "use_cache", "cache_position")
)
_DROPOUTS = ("attention_dropout", "resid_pdrop")
_PLACED = ("attention_mask", "position_ids")
_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_POSITIONS = 256
_VERSION = operator.attrgetter("_version")
_CHANGING = frozenset(("dynamic", "longrope"))  # rotary positions whose angles depend on the length


class FusedForward:
    """The forward of one decoder.

    Args:
        base: the decoder.

    Attributes:
        reason: why the decoder runs block by block; empty if it is fused.
        fused_calls: how many calls were fused.
        last_hidden: what the last fused call gave, if it was given one position's tokens and a cache, and no more.
    """

    def __init__(self, base: nn.Module) -> None:
        self._base = base
        self._begin()

    @property
    def base(self) -> nn.Module:
        """The decoder."""
        return self._base

    def _begin(self) -> None:
        self._found: Structure | None = None
        self._seen: Seen | None = None
        self.reason = ""
        self.fused_calls = 0
        self._is_checked = False
        self._is_checking = False
        self._handle: Tensor | None = None
        self._angles: tuple[Tensor, Tensor] | None = None
        self._values: list[Tensor] = []
        self._counted: list[Tensor] = []  # of these those that count their changes
        self._states: tuple[list[int], list[int]] = ([], [])
        self.last_hidden: Tensor | None = None
        self._output_class: Any = None
        self._cache_field = ""

    @property
    def __signature__(self) -> inspect.Signature:
        parameters = list(inspect.signature(type(self._base).forward).parameters.values())
        return inspect.Signature(parameters[1:])

    def __getstate__(self) -> dict[str, Any]:
        return {"_base": self._base}  # a copy looks at its own decoder when it is first called

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    @property
    def structure(self) -> Structure:
        """What the decoder is made of; raises `NotRecognized`."""
        if self._found is None:
            self._found = structure_of(self._base)
            self._seen = Seen((*self._base.layers, self._found.last))  # type: ignore[misc]
        return self._found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A call of the decoder."""
        if not torch.compiler.is_compiling():
            output = self._fused(args, kwargs)
            if output is not None:
                return output
        return type(self._base).forward(self._base, *args, **kwargs)

    def renew(self) -> None:
        """Take the planes that the weights have now; called when one of them was replaced."""
        self._handle = None

    def _weights(self) -> Iterator[PlaneWeight]:
        for block in self.structure.blocks:
            for group in block.groups:
                for layer in group:
                    yield layer.weight
            for pair in block.experts:
                for layer in pair:
                    yield layer.weight

    def _fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of a fused call; None if the call cannot be fused."""
        if self._found is None and not self.reason:
            try:
                self.structure  # noqa: B018
            except NotRecognized as error:
                self.reason = str(error)
        self.last_hidden = None
        if self.reason or self._is_checking or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return None
        given = dict(kwargs)
        if args:
            given["input_ids"] = args[0]
            if len(args) > 1 or "input_ids" in kwargs:
                return None
        return_dict = given.pop("return_dict", None)
        cache = next((given[name] for name in _CACHES if given.get(name) is not None), None)
        known = _KNOWN | ARGUMENTS if is_paged(cache) else _KNOWN
        if any(value is not None and value is not False for name, value in given.items() if name not in known):
            return None
        base: Any = self._base
        config = base.config
        if any(getattr(config, name, False) for name in _OUTPUTS):
            return None
        if not self._runs_blocks():
            return None
        ids, x = given.get("input_ids"), given.get("inputs_embeds")
        if (ids is None) == (x is None):
            return None
        if cache is None and given.get("use_cache", getattr(config, "use_cache", False)):
            from transformers import DynamicCache

            cache = DynamicCache(config=config)
        if x is None:
            x = base.embed_tokens(ids)
        if not _is_plain(x):
            return None
        hidden = self._paged(x, cache, given) if is_paged(cache) else self._cached(x, cache, given)
        if hidden is None:
            return None
        self.fused_calls += 1
        alone = hidden.shape[1] == 1 and all(given.get(n) is None for n in ("inputs_embeds", *_PLACED))
        self.last_hidden = hidden if alone else None
        output = self._output_class(last_hidden_state=hidden, **{self._cache_field: cache})
        return output.to_tuple() if return_dict is False else output

    def _runs_blocks(self) -> bool:
        """Whether the op may stand for the blocks as they are now; compares them if that was not done."""
        config: Any = self._base.config
        drops = self._base.training and any(getattr(config, name, 0.0) for name in _DROPOUTS)
        if drops or self._seen is None or not self._seen.is_as_before():
            return False
        if not self._is_checked:
            self._check()
        return not self.reason

    def hidden_of(self, ids: Tensor, cache: Any) -> Tensor | None:
        """The last hidden states of a call with these tokens and this cache alone; None if it cannot be fused."""
        if (
            self._found is None
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or not self._runs_blocks()
        ):
            return None
        x: Any = self._base.embed_tokens(ids)  # type: ignore[operator]
        hidden = self._cached(x, cache, {}) if _is_plain(x) else None
        self.fused_calls += hidden is not None
        return hidden

    def _cached(self, x: Tensor, cache: Any, given: dict[str, Any]) -> Tensor | None:
        room = room_in(cache, self.structure, x)
        if room is None:
            return None
        try:
            first = first_positions(given.get("attention_mask"), room.past, x.shape[1], self.structure.windows)
        except OtherMask:
            return None
        if first is not None and (not room.has_all or len(first) != x.shape[0]):
            return None
        return self._run(x.contiguous(), room, given.get("position_ids"), first)

    def _paged(self, x: Tensor, cache: Any, given: dict[str, Any]) -> Tensor | None:
        pages = pages_of(cache, given, len(self.structure.blocks), x.shape[1])
        turned = self._angles_of(given.get("position_ids"), 0, x)
        if pages is None or turned is None or x.shape[0] != 1:
            return None
        hidden: Tensor = torch.ops.foveate.decoder_blocks_paged(
            x.contiguous(),
            self._held(),
            self._book(),
            pages.keys,
            pages.values,
            *turned,
            pages.lengths,
            pages.ends,
            pages.reads,
            pages.writes,
        )
        return hidden

    def _book(self) -> Tensor:
        passes = self.structure.blocks[0].groups[0][0].weight.passes
        assert passes is not None
        return passes.book

    def _held(self) -> Tensor:
        """The handle of the blocks, made when it is first needed, and again after a weight was replaced or a norm was
        changed: the handle may have its values as float32.
        """
        if self._handle is None or self._states_of_values() != self._states:
            self._handle = self._hold()
            self._states = self._states_of_values()
        return self._handle

    def _states_of_values(self) -> tuple[list[int], list[int]]:
        """Where the values are that the handle may have copies of, and how often they were changed in place."""
        return list(map(Tensor.data_ptr, self._values)), list(map(_VERSION, self._counted))

    def _run(self, x: Tensor, room: Room, positions: Tensor | None, first: Any) -> Tensor | None:
        turned = self._angles_of(positions, room.past, x)
        if turned is None:
            return None
        given = (x, self._held(), self._book(), room.keys, room.values, *turned, first, room.pasts)
        hidden: Tensor
        if room.packed is None:
            hidden = torch.ops.foveate.decoder_blocks(*given)
        else:
            packed = room.packed
            hidden = torch.ops.foveate.decoder_blocks_packed(*given, packed.parts, packed.places, packed.block)
        room.advance(x.shape[1])
        return hidden

    def _angles_of(self, positions: Tensor | None, past: int, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of the positions of a call, float32 [tables, B or 1, S, rotary size]."""
        rotary: Any = self._base.rotary_emb
        length = x.shape[1]
        if positions is not None and (positions.dim() != 2 or positions.shape[0] not in (1, x.shape[0])):
            return None
        kinds = getattr(rotary, "rope_type", "default")
        if _CHANGING & set(kinds.values() if isinstance(kinds, dict) else (kinds,)):  # angles that depend on the length
            if positions is None:
                positions = torch.arange(past, past + length)[None]
            return self._tables_of(positions)
        begin = past
        if positions is not None:
            if positions.shape[0] == 1 and length == 1:
                begin, positions = int(positions), None
            elif positions.shape[0] == 1 and torch.equal(positions[0], torch.arange(past, past + length)):
                positions = None
        last = begin + length if positions is None else int(positions.max()) + 1
        if begin < 0 or (positions is not None and int(positions.min()) < 0):
            return None
        if self._angles is None or self._angles[0].shape[2] < last:
            count = max(_LEAST_POSITIONS, 1 << (last - 1).bit_length())
            self._angles = self._tables_of(torch.arange(count)[None])
        cosine, sine = self._angles
        if positions is not None:
            return cosine[:, 0, positions], sine[:, 0, positions]
        cosine, sine = cosine[:, :, begin : begin + length], sine[:, :, begin : begin + length]
        return (cosine, sine) if cosine.shape[0] == 1 else (cosine.contiguous(), sine.contiguous())

    def _tables_of(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        rotary: Any = self._base.rotary_emb
        found = [angles(rotary, positions, table) for table in self.structure.tables]
        return torch.stack([cosine for cosine, _ in found]), torch.stack([sine for _, sine in found])

    def _hold(self) -> Tensor:
        """The handle of the blocks as they are now."""
        groups, biases, norms, numbers, constants = [], [], [], [], []
        routers, experts = [], []
        for block in self.structure.blocks:
            groups += [LinearCall(layers).handle for layers in block.groups]
            groups += [_NONE] * (len(GROUPS) - len(block.groups))
            routers.append(_NONE if block.router is None else _float32(block.router.weight))
            experts += [LinearCall((layer,)).handle for pair in block.experts for layer in pair]
            biases += _biases(block)
            norms += [_weight(norm, kind) for norm, kind in zip(block.norms, block.norm_kinds, strict=True)]
            numbers += [*vars(block.numbers).values(), *(kind for kind, _ in block.norm_kinds)]
            constants += [*vars(block.constants).values(), *(eps for _, eps in block.norm_kinds)]
        structure = self.structure
        norms.append(_weight(structure.last, structure.last_kind))
        numbers += [structure.last_kind[0], structure.width, structure.rotary_size, len(structure.tables)]
        constants.append(structure.last_kind[1])
        layers = [layer for block in structure.blocks for group in block.groups for layer in group]
        modules = [*layers, structure.last, *(m for block in structure.blocks for m in (*block.norms, block.router))]
        self._values = [own for m in modules if m is not None for own in m._parameters.values() if own is not None]
        self._counted = [value for value in self._values if not value.is_inference()]
        for weight in self._weights():
            weight.users.add(self)
        handle: Tensor = torch.ops.foveate.decoder_handle(groups, biases, norms, routers, experts, numbers, constants)
        return handle

    @torch.no_grad()
    def _check(self) -> None:
        """Compare both ways on random tokens, and on hidden states as large as norms make them."""
        base: Any = self._base
        self._is_checked, self._is_checking = True, True
        try:
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(0, base.config.vocab_size, (2, 5), generator=generator)
            x = base.embed_tokens(ids)
            # embeddings may be so small that what a decoder does with them does not show beside its blocks
            unit = torch.randn(x.shape, generator=generator).to(x.dtype)
            for given, hidden in (({"input_ids": ids}, x), ({"inputs_embeds": unit}, unit)):
                output = type(base).forward(base, **given, use_cache=False)
                expected = output.last_hidden_state
                found = self._by_op(hidden)
                difference = math.inf if found is None else agreement.apart(base, hidden, expected, found)
                if not (difference <= agreement.USUAL or difference <= agreement.unsteadiness(base, hidden, expected)):
                    self.reason = f"its blocks compute something else: on random tokens they differ by {difference:.2g}"
                    return
            self._output_class = type(output)
            self._cache_field = next(name for name in _CACHES if name in output.__dataclass_fields__)
        finally:
            self._is_checking = False

    def _by_op(self, x: Tensor) -> Tensor | None:
        """The last hidden states of x [2, 5, H] by the op, which takes four positions, and then one after them."""
        room = scratch(self.structure, x, shared=False)
        parts = []
        for begin, end in ((0, 4), (4, 5)):
            room.past, room.pasts = begin, [begin] * len(room.keys)
            part = self._run(x[:, begin:end].contiguous(), room, None, None)
            if part is None:
                return None
            parts.append(part.float())
        return torch.cat(parts, 1)


def _is_plain(x: Any) -> bool:
    """Whether these are hidden states [B, S, H] that the op takes: no tensor that stands for others."""
    is_known = type(x) is Tensor and x.device.type == "cpu" and x.dtype in _DTYPES
    return is_known and x.dim() == 3 and x.numel() > 0


def _weight(norm: nn.Module | None, kind: tuple[int, float]) -> Tensor:
    if norm is None or kind[0] == NO_NORM:
        return _NONE
    return _float32(norm.weight)


def _float32(weight: Any) -> Tensor:
    made: Tensor = weight.detach().float().contiguous()
    return made


def _biases(block: Block) -> list[Tensor]:
    """The biases of a block's layers, in the seven places of `decoder_handle`."""
    made = []
    groups = (*block.groups, *[()] * (len(GROUPS) - len(block.groups)))
    for layers, places in zip(groups, GROUPS, strict=True):
        own = [NO_BIAS if layer.bias is None else layer.bias.detach().float() for layer in layers]
        made += [*own, *[NO_BIAS] * (places - len(own))]
    return made
