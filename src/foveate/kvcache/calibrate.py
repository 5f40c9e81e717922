"""calibrate_cache: the loss that every head's cached keys and values add at every level.

Each sequence is cut in two. The first part fills an exact cache; the second is run on it, and the loss along a random
direction of its logits (`foveate.collect.objectives`) is differentiated with respect to what was cached. With g_td the
gradient of a cached number, of token t and channel d, and e_td the error that packing it makes, a head adds a loss of

    S(level) = 1/2 E[sum_d (sum_t g_td e_td)^2]

nats per token. Errors are added up over a channel's tokens before they are squared: keys that hardly change from token
to token are all rounded the same way, and their errors do not cancel. One forward and one backward pass per batch
measure all layers, heads and levels. At 2 bits the error can be too large for a second-order score, since it changes
the softmax too much. So the divergence of each layer at 2 bits is then measured on one batch, and divided among its
heads in proportion to their scores.

Both numbers are for queries that read the whole cache packed. The exact window of a cache makes the true loss smaller.

Legend: B sequences, H heads of keys and values, T tokens, D channels a head, L levels, n tokens scored, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.collect.evaluation import evaluating
from foveate.collect.objectives import Logits, check_batches
from foveate.errors import DataError, MissingExtraError, SiteError
from foveate.formats.levels import CACHE_LEVELS
from foveate.kvcache.blocks import Blocks, is_exact
from foveate.kvcache.cache import BLOCK, check_block
from foveate.kvcache.profile import CacheProfile
from foveate.nn.foreign.cache_argument import cache_argument
from foveate.precision.maps import Site
from foveate.progress import track

_KINDS = ("key", "value")
_COARSEST = CACHE_LEVELS[0]


def calibrate_cache(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    block: int = BLOCK,
    measured: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> CacheProfile:
    """Measure the loss that each head's cached keys and values add at each level.

    Args:
        model: a transformers model with logits and a key/value cache.
        batches: sequences of tokens: tensors [B, T], or mappings with `input_ids` and, where there is padding,
            `attention_mask`. Longer than `block`; half of each fills the cache, the other half reads it.
        block: tokens that the cache will pack together.
        measured: on how many batches the divergence at 2 bits is measured, by one forward pass for each layer's keys
            and one for its values. With 0 it is predicted only.
        seed: of the random directions.
        progress: whether to show a progress bar.

    Returns:
        The losses; their `plan(fv.Budget(bits=4.0))` is a map for `quantized_cache`.

    Raises:
        DataError: no batches, sequences that are too short, or a loss that is not finite.
        SiteError: the model has no layer with plain attention.
        MissingExtraError: transformers is not installed.
    """
    try:
        from foveate.kvcache.layers import plain_layers
    except ImportError as error:
        raise MissingExtraError("calibrate_cache takes transformers' models: pip install 'foveate[cli]'") from error
    check_block(block)
    plain = plain_layers(getattr(model, "config", None))[1]
    if not plain:
        raise SiteError("the model has no layer with plain attention over all tokens: there is no cache to quantize")
    sites: tuple[Site, ...] = ()
    scores: list[Tensor] = []
    lost: list[list[float]] = []
    samples, itemsize = 0, 4
    generator = torch.Generator().manual_seed(seed)
    with evaluating(model):
        for number, batch in enumerate(track(check_batches(batches), "calibrating the cache", show=progress)):
            half = _SecondHalf(model, batch, plain, block)
            if not sites:
                sites = _sites(model, plain, half.cached, block)
                itemsize = half.cached[0].element_size()
                scores = [torch.zeros(s.rows, len(CACHE_LEVELS), dtype=torch.float64) for s in sites]
            gradients, count = half.gradients(generator)
            for total, x_BHTD, g_BHTD in zip(scores, half.cached, gradients, strict=True):
                total += _scores(x_BHTD, g_BHTD, block)
            samples += count
            if number < measured:
                lost.append(half.measure(_COARSEST, block))
    if not samples:
        raise DataError("there are no batches to calibrate on")
    losses = {s.name: (total / samples).float() for s, total in zip(sites, scores, strict=True)}
    if lost:
        for site, parts in zip(sites, zip(*lost, strict=True), strict=True):
            predicted = float(losses[site.name][:, 0].sum())
            if predicted > 0:
                losses[site.name][:, 0] *= sum(parts) / len(parts) / predicted
    if not all(bool(torch.isfinite(table).all()) for table in losses.values()):
        raise DataError("the model's gradients, keys or values are not finite on these batches")
    return CacheProfile(sites, losses, samples, itemsize)


def _sites(model: nn.Module, plain: Sequence[int], cached: Sequence[Tensor], block: int) -> tuple[Site, ...]:
    names = [_attention_name(model, layer) for layer in plain]
    return tuple(
        Site(f"{names[i // 2]}:cache.{_KINDS[i % 2]}", "cache", x_BHTD.shape[1], x_BHTD.shape[3], block)
        for i, x_BHTD in enumerate(cached)
    )


def _attention_name(model: nn.Module, layer: int) -> str:
    """The name of the attention module to which transformers gives the number `layer` in the cache."""
    names: list[str] = [name for name, module in model.named_modules() if getattr(module, "layer_idx", None) == layer]
    attention = [name for name in names if "attn" in name.lower() or "attention" in name.lower()]
    return min(attention or names or [f"layers.{layer}"], key=len)


class _SecondHalf:
    """The second half of a batch, which runs on the cache that the first half filled.

    Attributes:
        cached: keys and values [B, H, T, D] of each plain layer in turn.
    """

    def __init__(self, model: Any, batch: Any, plain: Sequence[int], block: int) -> None:
        from transformers import DynamicCache

        ids_BT = batch["input_ids"] if isinstance(batch, Mapping) else batch
        if not isinstance(ids_BT, Tensor) or ids_BT.dim() != 2 or ids_BT.shape[1] <= block:
            shape = tuple(ids_BT.shape) if isinstance(ids_BT, Tensor) else type(ids_BT).__name__
            raise DataError(f"a batch (={shape}) is not tokens [B, T] with T > {block}, the tokens of a block")
        first = max(ids_BT.shape[1] // 2 // block, 1) * block
        self._mask_BT: Tensor | None = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        self._model, self._plain = model, plain
        self._cache: Any = DynamicCache(config=model.config)
        with torch.no_grad():
            mask_BT = None if self._mask_BT is None else self._mask_BT[:, :first]
            past = cache_argument(model, self._cache)
            model(input_ids=ids_BT[:, :first], attention_mask=mask_BT, use_cache=True, **past)
        self._ids_BT = ids_BT[:, first:]
        self._seen = {} if self._mask_BT is None else {"attention_mask": self._mask_BT[:, first:]}
        self.cached: list[Tensor] = []
        layers: list[Any] = [self._cache.layers[i] for i in plain]
        for layer in layers:
            self.cached += [layer.keys.detach(), layer.values.detach()]

    def _run(self, cached: Sequence[Tensor]) -> Any:
        """The model's output on the second half, with these keys and values in place of the first half's."""
        cache = copy.deepcopy(self._cache)
        for i, keys, values in zip(self._plain, cached[::2], cached[1::2], strict=True):
            cache.layers[i].keys, cache.layers[i].values = keys, values
        past = cache_argument(self._model, cache)
        return self._model(input_ids=self._ids_BT, attention_mask=self._mask_BT, use_cache=True, **past)

    def gradients(self, generator: torch.Generator) -> tuple[Sequence[Tensor], int]:
        """(of the loss along a random direction with respect to each of `cached`, how many tokens it is a sum over)."""
        leaves = [x.clone().requires_grad_() for x in self.cached]
        with torch.enable_grad():
            loss, count = Logits().loss(self._run(leaves), self._seen, generator)
            return torch.autograd.grad(loss, leaves), count

    @torch.no_grad()
    def measure(self, level: int, block: int) -> list[float]:
        """The mean divergence, in nats per token, that packing only one of `cached` makes, for each."""
        objective = Logits()
        wanted_nV = objective.outcome(self._run(self.cached), self._seen)
        divergences = []
        for i, x_BHTD in enumerate(self.cached):
            packed = [*self.cached[:i], _packed(x_BHTD, level, block), *self.cached[i + 1 :]]
            outcome_nV = objective.outcome(self._run(packed), self._seen)
            divergences.append(float(objective.divergence(wanted_nV, outcome_nV).double().mean()))
        return divergences


def _packed(x_BHTD: Tensor, level: int, block: int) -> Tensor:
    """Keys or values as they are read at a level."""
    blocks = Blocks(level, block)
    blocks.append(x_BHTD)
    return blocks.read(0, len(blocks)).flatten(2, 3)


def _scores(x_BHTD: Tensor, g_BHTD: Tensor, block: int) -> Tensor:
    """1/2 of the sum over sequences and channels of (sum over tokens of g error)^2, float64 [H, L]."""
    columns = []
    for level in CACHE_LEVELS:
        if is_exact(level, x_BHTD.dtype):
            columns.append(torch.zeros(x_BHTD.shape[1], dtype=torch.float64))
            continue
        error_BHTD = _packed(x_BHTD, level, block).float() - x_BHTD.float()
        columns.append(0.5 * (g_BHTD.float() * error_BHTD).sum(2).double().square().sum((0, 2)))
    return torch.stack(columns, 1)
