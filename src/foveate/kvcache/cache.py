"""`quantized_cache`: a key/value cache of transformers whose older tokens are packed.

    cache = fv.quantized_cache(model.config, 4)
    model.generate(**inputs, cache=cache)  # `past_key_values=cache` up to transformers 5.23

It is a transformers `Cache` (see `layers.py`). transformers is an extra, so it is imported when a cache is made.
Levels are one for all, or a precision map with two sites a layer, `...self_attn:cache.key` and `...:cache.value`, whose
tiles are heads: `foveate.calibrate_cache` measures what each of them costs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foveate.errors import DataError, LevelError, MissingExtraError, SiteError
from foveate.formats.levels import check_cache_level
from foveate.precision.maps import PrecisionMap

if TYPE_CHECKING:
    from foveate.kvcache.layers import Levels, QuantizedCache

WINDOW = 32
BLOCK = 64
_BLOCKS = range(32, 1025, 32)


def check_block(block: int) -> int:
    """Return `block` if it can be the tokens of a block, else raise `LevelError`."""
    if block in _BLOCKS:
        return block
    raise LevelError(f"block (={block!r}) is not a multiple of 32 from 32 to 1024 tokens")


def quantized_cache(
    config: Any, levels: int | PrecisionMap = 4, *, window: int = WINDOW, block: int | None = None
) -> QuantizedCache:
    """A transformers `Cache` that packs all but the most recent tokens, for a model's argument `cache`.

    Works where `DynamicCache` does: greedy and sampled decoding, beam search, padded batches, `crop` and assisted
    decoding, copies. Appending packs new blocks and never touches old ones. A decoder whose blocks run in one op
    (`foveate.fuse`) reads blocks as they lie; elsewhere keys and values are unpacked one layer at a time, so memory
    holds the packed cache and one layer's numbers. Layers with a sliding window, or without plain attention, keep
    transformers' own cache. It does not compile, and gradients flow to exact tokens only.

    Args:
        config: of the model, a transformers configuration.
        levels: 2, 4, 8, 16 or 32 (exact) for all keys and values, or a map with levels for each head's.
        window: at least this many recent tokens stay exact; up to `block` - 1 more wait to be packed.
        block: tokens that are packed together, a multiple of 32, by default that of the map, or 64. Each channel of a
            block has its own range: 32 / `block` bits per number.

    Returns:
        The cache. `cache.nbytes` is what it holds at the moment.

    Raises:
        DataError: `config` is no configuration.
        LevelError: a level, window or block that does not exist.
        SiteError: the map was made for another model, or the model has no layer with plain attention.
        MissingExtraError: transformers is not installed.
    """
    try:
        from foveate.kvcache.layers import QuantizedCache, QuantizedLayer, plain_layers
    except ImportError as error:
        raise MissingExtraError("a quantized cache is one of transformers': pip install 'foveate[cli]'") from error
    if type(window) is not int or window < 0:
        raise LevelError(f"window (={window!r}) is not a whole number of tokens, 0 or more")
    if not hasattr(config, "get_text_config"):
        raise DataError(f"config is a {type(config).__name__}, not a transformers configuration: give model.config")
    layers, plain = plain_layers(config)
    if not plain:
        raise SiteError("the model has no layer with plain attention over all tokens: there is no cache to quantize")
    for i, (keys, values) in zip(plain, _levels_of(levels, len(plain)), strict=True):
        layers[i] = QuantizedLayer(keys, values, window, check_block(_block_of(levels) if block is None else block))
    return QuantizedCache(layers)


def _levels_of(levels: int | PrecisionMap, layers: int) -> list[tuple[Levels, Levels]]:
    """(of keys, of values) for each layer."""
    if isinstance(levels, int):
        return [(check_cache_level(levels),) * 2] * layers
    sites = [s.name for s in levels.sites if s.kind == "cache"]
    keys, values = ([n for n in sites if n.endswith(f":cache.{what}")] for what in ("key", "value"))
    if len(keys) != layers or len(values) != layers:
        raise SiteError(
            f"the map has {len(keys)} cache.key and {len(values)} cache.value sites, and the model has {layers} layers "
            "with plain attention"
        )
    return [(_heads(levels, key), _heads(levels, value)) for key, value in zip(keys, values, strict=True)]


def _heads(plan: PrecisionMap, name: str) -> Levels:
    level = plan.levels[name]
    return level if isinstance(level, int) else tuple(level)


def _block_of(levels: int | PrecisionMap) -> int:
    if isinstance(levels, int):
        return BLOCK
    return next(s.group for s in levels.sites if s.kind == "cache")
