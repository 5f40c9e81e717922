"""The library that every op of foveate is defined in, and the one way to define an op.

An op is a schema and a reference in plain torch, which is its meaning. `define` registers the reference in the
dispatcher, for the CPU alone. The compiled kernels replace it there. Tensors on any other device are refused with a
sentence, because the reference would serve them slowly and nobody would see why. A backend for a device registers its
own kernels for that device's dispatch key, which take precedence over the refusal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from foveate.errors import DeviceError, FoveateError

LIBRARY = torch.library.Library("foveate", "DEF")


def define(schema: str, reference: Callable[..., Any]) -> str:
    """Define an op that its reference computes on the CPU, and that refuses tensors on other devices.

    The dispatcher has one entry for both, at the alias of all devices' keys. An entry at the CPU's key would be in the
    place of the compiled kernels, and the dispatcher warns of a kernel that replaces another one.

    Args:
        schema: of the op, its name first.
        reference: what the op means, in plain torch.

    Returns:
        The op's name.
    """
    name = schema[: schema.index("(")]

    @functools.wraps(reference)
    def on_the_cpu(*args: Any, **named: Any) -> Any:
        for tensor in _tensors((*args, *named.values())):
            if tensor.device.type != "cpu":
                raise DeviceError(
                    f"foveate.{name} has no kernels for device (={tensor.device}), only for the CPU; move the model and"
                    " its inputs there (foveate.backends() says what runs on each device)"
                )
        return reference(*args, **named)

    LIBRARY.define(schema)
    LIBRARY.impl(name, on_the_cpu, "CompositeExplicitAutograd")
    if "!)" in schema:
        # torch resolves lazy tensors for ops that return what they write, and ends the process for others
        for key in ("Negative", "Conjugate"):
            LIBRARY.impl(name, functools.partial(_refuse_lazy, name), key)
    return name


def _refuse_lazy(name: str, *_: Any, **__: Any) -> NoReturn:
    raise FoveateError(
        f"foveate.{name} writes into an argument, and takes no tensor that is negated or conjugated lazily: give "
        "tensor.resolve_neg() or tensor.resolve_conj()"
    )


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    for value in args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
