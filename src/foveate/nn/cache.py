"""calibrate_cache: what every head's cached keys and values lose at every level, and the levels that lose least.

Each sequence is cut in two. The first part fills an exact cache; the second is run on it, and the loss along a random
direction of its logits (`foveate.collect.objectives`) is differentiated with respect to what was cached. With g_t the
gradient of a cached key or value of token t and d_t the error that packing it makes, a head loses

    S(level) = 1/2 E[sum_t (g_t . d_t)^2]

nats a token, as far as errors of different tokens are independent. One forward and one backward pass a batch measure
all layers, heads and levels. It is what queries lose that see the whole cache packed: a cache's exact window only makes
it less.

Legend: B sequences, H heads of keys and values, T tokens, D channels a head, L levels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.activations.cache import BLOCK, WINDOW, check_block
from foveate.activations.cache_blocks import Blocks, is_exact
from foveate.allocate.problem import Choices
from foveate.allocate.solve import solve_bytes, solve_loss
from foveate.collect.objectives import Logits
from foveate.errors import BudgetError, DataError, MissingExtraError, SiteError
from foveate.formats.levels import CACHE_LEVELS, cache_bits_of, check_cache_level
from foveate.maps import Budget, PrecisionMap, Site
from foveate.progress import track
from foveate.sizes import format_bytes

CHOICE = (2, 4, 8, 16)
_KINDS = ("key", "value")


@dataclass(frozen=True, eq=False)
class CacheProfile:
    """What a model's cache loses at every level.

    Attributes:
        sites: two a layer, of kind `cache`, `...self_attn:cache.key` and `...:cache.value`; their tiles are heads.
        losses: for each site float32 [H, 5], nats a token at each of `CACHE_LEVELS`.
        samples: tokens that the losses are a mean over.
        itemsize: bytes of a number of the exact cache.
    """

    sites: tuple[Site, ...]
    losses: Mapping[str, Tensor]
    samples: int
    itemsize: int

    def __repr__(self) -> str:
        return f"CacheProfile({len(self.sites)} sites, {self.samples:,} tokens)"

    def uniform(self, level: int) -> PrecisionMap:
        """The map with every head at one level."""
        column = CACHE_LEVELS.index(check_cache_level(level))
        lost = sum(float(table[:, column].double().sum()) for table in self.losses.values())
        return PrecisionMap(self.sites, {s.name: level for s in self.sites}, predicted_loss=lost)

    def nbytes(self, plan: PrecisionMap, tokens: int, *, window: int = WINDOW, sequences: int = 1) -> int:
        """Bytes that a cache of a map holds of so many tokens, the exact ones included."""
        block = self.sites[0].group
        packed = max(tokens - window, 0) // block * block
        numbers = sum(s.rows * s.columns for s in self.sites)
        bits = sum(
            packed * s.columns * self._bits(level, s)
            for s in self.sites
            for level in _each(plan.levels[s.name], s.rows)
        )
        return sequences * (round(bits / 8) + (tokens - packed) * numbers * self.itemsize)

    def plan(
        self, budget: Budget, *, tokens: int | None = None, window: int = WINDOW, levels: Sequence[int] = CHOICE
    ) -> PrecisionMap:
        """The level of every head's keys and values under a budget.

        Args:
            budget: `bits`: on average for a number that is packed, ranges counted; `bytes`: of the whole cache of one
                sequence of `tokens` tokens, the exact ones included; `loss`: the most nats a token that it may lose.
            tokens: for `bytes`.
            window: for `bytes`, the tokens that stay exact, as given to `quantized_cache`.
            levels: those to choose among.

        Raises:
            BudgetError: nothing meets the budget; the message says the least possible.
            LevelError: a level that caches do not have.
        """
        chosen = tuple(sorted({check_cache_level(level) for level in levels}))
        if not chosen:
            raise BudgetError("levels is empty: give at least one of 2, 4, 8, 16, 32")
        problem = self._problem(chosen)
        if budget.loss is not None:
            return self._to_map(problem, solve_loss(problem, budget.loss))
        least = float(problem.cost_UL[:, 0].sum())
        numbers = sum(s.rows * s.columns for s in self.sites)
        if budget.bits is not None:
            note = f"no map averages {budget.bits:g} bits a cached number: the least is {8 * least / numbers:.4f}"
            return self._to_map(problem, solve_bytes(problem, budget.bits * numbers / 8 * (1 + 1e-9), note))
        if type(tokens) is not int or tokens < 1:
            raise BudgetError(f"tokens (={tokens!r}) must say how long the cache is that the bytes are for")
        assert isinstance(budget.bytes, int)
        packed = max(tokens - window, 0) // self.sites[0].group * self.sites[0].group
        exact = (tokens - packed) * numbers * self.itemsize
        note = (
            f"no map holds {tokens} tokens in {format_bytes(budget.bytes)}: the least is "
            f"{format_bytes(exact + packed * least)} ({math.ceil(exact + packed * least)} bytes)"
        )
        if budget.bytes < exact:
            raise BudgetError(note)
        room = (budget.bytes - exact) / packed if packed else math.inf
        return self._to_map(problem, solve_bytes(problem, room, note))

    def _bits(self, level: int, site: Site) -> float:
        exact = level >= 8 * self.itemsize
        return 8.0 * self.itemsize if exact else cache_bits_of(level, site.group)

    def _problem(self, levels: tuple[int, ...]) -> Choices:
        """Units are heads, in the order of the sites; costs are bytes a token."""
        columns = [CACHE_LEVELS.index(level) for level in levels]
        losses = torch.cat([self.losses[s.name][:, columns].double().cummin(1).values for s in self.sites])
        costs = [
            torch.tensor([s.columns * self._bits(level, s) / 8 for level in levels], dtype=torch.float64).expand(
                s.rows, -1
            )
            for s in self.sites
        ]
        return Choices(levels, losses, torch.cat(costs))

    def _to_map(self, problem: Choices, choice_U: Tensor) -> PrecisionMap:
        taken = torch.tensor(problem.levels, dtype=torch.uint8)[choice_U].split([s.rows for s in self.sites])
        levels = {s.name: bytes(part.tolist()) for s, part in zip(self.sites, taken, strict=True)}
        lost = float(problem.loss_UL.gather(1, choice_U[:, None]).sum())
        return PrecisionMap(self.sites, levels, predicted_loss=lost)


def _each(levels: int | bytes, heads: int) -> Sequence[int]:
    return [levels] * heads if isinstance(levels, int) else levels


def calibrate_cache(
    model: nn.Module, batches: Iterable[Any], *, block: int = BLOCK, seed: int = 0, progress: bool = True
) -> CacheProfile:
    """Measure what each head's cached keys and values lose at each level.

    Args:
        model: a transformers model with logits and a key/value cache.
        batches: sequences of tokens: tensors [B, T], or mappings with `input_ids` and, where there is padding,
            `attention_mask`. Longer than `block`; half of each fills the cache, the other half reads it.
        block: tokens that the cache will pack together.
        seed: of the random directions.
        progress: whether to show how far it is.

    Returns:
        The losses, whose `plan(fv.Budget(bits=4.0))` is a map for `quantized_cache`.

    Raises:
        DataError: no batches, sequences that are too short, or a loss that is not finite.
        SiteError: the model has no layer with plain attention.
        MissingExtraError: transformers is not installed.
    """
    try:
        from foveate.activations.cache_layers import plain_layers
    except ImportError as error:
        raise MissingExtraError("calibrate_cache takes transformers' models: pip install 'foveate[cli]'") from error
    check_block(block)
    plain = plain_layers(model.config)[1]
    if not plain:
        raise SiteError("the model has no layer with plain attention over all tokens: there is no cache to quantize")
    names = [_attention_name(model, i) for i in plain]
    sites: tuple[Site, ...] = ()
    sums: dict[str, Tensor] = {}
    samples, itemsize = 0, 4
    generator = torch.Generator().manual_seed(seed)
    training = model.training
    model.eval()
    try:
        for batch in track(batches, "calibrating the cache", show=progress):
            cached, gradients, count = _gradients(model, batch, plain, block, generator)
            if not sites:
                itemsize = cached[0].element_size()
                sites = tuple(
                    Site(f"{names[i // 2]}:cache.{_KINDS[i % 2]}", "cache", x.shape[1], x.shape[3], block)
                    for i, x in enumerate(cached)
                )
                sums = {s.name: torch.zeros(s.rows, len(CACHE_LEVELS), dtype=torch.float64) for s in sites}
            for site, x_BHTD, g_BHTD in zip(sites, cached, gradients, strict=True):
                sums[site.name] += _losses(x_BHTD, g_BHTD, block)
            samples += count
    finally:
        model.train(training)
    if not samples:
        raise DataError("there are no batches to calibrate on")
    losses = {name: (total / samples).float() for name, total in sums.items()}
    if not all(bool(torch.isfinite(table).all()) for table in losses.values()):
        raise DataError("the model's gradients, keys or values are not finite on these batches")
    return CacheProfile(sites, losses, samples, itemsize)


def _losses(x_BHTD: Tensor, g_BHTD: Tensor, block: int) -> Tensor:
    """1/2 sum over sequences and tokens of (g . error)^2, float64 [H, L]."""
    columns = []
    for level in CACHE_LEVELS:
        if is_exact(level, x_BHTD.dtype):
            columns.append(torch.zeros(x_BHTD.shape[1], dtype=torch.float64))
            continue
        blocks = Blocks(level, block)
        blocks.append(x_BHTD)
        error_BHTD = blocks.read(0, len(blocks)).flatten(2, 3).float() - x_BHTD.float()
        columns.append(0.5 * (g_BHTD.float() * error_BHTD).sum(3).double().square().sum((0, 2)))
    return torch.stack(columns, 1)


def _gradients(
    model: Any, batch: Any, plain: Sequence[int], block: int, generator: torch.Generator
) -> tuple[list[Tensor], Sequence[Tensor], int]:
    """(keys and values of each plain layer in turn, their gradients, tokens that were scored) of one batch."""
    from transformers import DynamicCache

    ids_BT = batch["input_ids"] if isinstance(batch, Mapping) else batch
    mask_BT = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(ids_BT, Tensor) or ids_BT.dim() != 2 or ids_BT.shape[1] <= block:
        shape = tuple(ids_BT.shape) if isinstance(ids_BT, Tensor) else type(ids_BT).__name__
        raise DataError(f"a batch (={shape}) is not tokens [B, T] with T > {block}, the tokens of a block")
    first = max(ids_BT.shape[1] // 2 // block, 1) * block
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(
            input_ids=ids_BT[:, :first],
            attention_mask=None if mask_BT is None else mask_BT[:, :first],
            past_key_values=cache,
            use_cache=True,
        )
    cached: list[Tensor] = []
    for layer in (cache.layers[i] for i in plain):
        layer.keys = layer.keys.detach().requires_grad_()
        layer.values = layer.values.detach().requires_grad_()
        cached += [layer.keys, layer.values]
    with torch.enable_grad():
        output = model(input_ids=ids_BT[:, first:], attention_mask=mask_BT, past_key_values=cache, use_cache=True)
        seen = {} if mask_BT is None else {"attention_mask": mask_BT[:, first:]}
        loss, count = Logits().loss(output, seen, generator)
        gradients = torch.autograd.grad(loss, cached)
    return [x.detach() for x in cached], gradients, count


def _attention_name(model: nn.Module, layer: int) -> str:
    """The module that caches as number `layer`, by the number that transformers gives it."""
    found = [name for name, module in model.named_modules() if getattr(module, "layer_idx", None) == layer]
    attention = [name for name in found if "attn" in name.lower() or "attention" in name.lower()]
    return min(attention or found or [f"layers.{layer}"], key=len)
