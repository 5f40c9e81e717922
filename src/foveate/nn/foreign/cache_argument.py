"""The name by which a model takes its key/value cache, and by which it returns it.

transformers called the argument `past_key_values` up to release 5.23, and calls it `cache` since. Newer releases take
the old name too for a while, and warn. A model written for an older release takes the old name only. So the name is
read from the signature of the callee. A callee that takes any keyword, such as `generate` or a wrapper around a model,
passes the cache on to transformers, and takes it by the name that the installed release uses.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from foveate.errors import DataError

#: The newest first.
_NAMES = ("cache", "past_key_values")


def cache_argument(callee: Callable[..., Any], cache: Any) -> dict[str, Any]:
    """A key/value cache as the keyword argument by which `callee` takes it.

    Args:
        callee: a transformers model, or a part or method of one, such as `model.generate`.
        cache: the cache; None for a new one.

    Returns:
        A mapping of one item, for `callee(..., **cache_argument(callee, cache))`.

    Example:
        >>> model(input_ids=ids, **cache_argument(model, cache), use_cache=True)
    """
    return {_named_in(callee) or _named_by_transformers(): cache}


def cache_of(output: Any) -> Any:
    """The key/value cache that a model returned with its output.

    Raises:
        DataError: there is none in it.
    """
    for name in _NAMES:
        if name in output:
            return output[name]
    raise DataError(f"a {type(output).__name__} holds no key/value cache: the model cannot go on from its last token")


def _named_in(callee: Callable[..., Any]) -> str | None:
    """The name in the signature; None where the callee takes any keyword."""
    parameters = inspect.signature(callee.forward if isinstance(callee, nn.Module) else callee).parameters
    return next((name for name in _NAMES if name in parameters), None)


def _named_by_transformers() -> str:
    from transformers import GenerationMixin

    return _named_in(GenerationMixin.prepare_inputs_for_generation) or _NAMES[0]
