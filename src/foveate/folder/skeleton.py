"""A transformers model without weights, made from the configuration in a head; and what a hostile one may not do.

The configuration is a stranger's. What is built from it runs code of transformers' alone, reaches no network, and is no
larger than what the head can fill: every parameter and buffer that a model has is either a weight on planes or in the
file of the rest, so that their names and sizes bound how many modules there can be.
"""

from __future__ import annotations

import importlib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration

from foveate.checkpoint import Folder
from foveate.errors import CheckpointError, FoveateError, MissingExtraError
from foveate.folder.sentence_transformer import assembled

#: Keys that would have transformers choose or fetch code or weights, and one that it never writes.
_ODD = frozenset(
    {
        "attn_implementation",
        "experts_implementation",
        "quantization_config",
        "auto_map",
        "trust_remote_code",
        "use_pretrained_backbone",
        "num_labels",
    }
)
#: A tensor may be registered again when it is tied, and a module with tensors comes with some that have none.
_TIMES, _MODULES = 4, 32
_FEW = 1000
#: Keys of numbers that transformers counts up to, and how far it may where the head has nothing as large.
_COUNT = re.compile(r"(^|_)(num|n|layers?|depths?|blocks?|labels|class(es)?|stages|heads|experts)(_|$)")
_MOST_COUNTED = 1 << 20
_LARGEST = 1 << 53


class _TooLarge(Exception):
    """More than the head can fill."""


class _Reached(BaseException):
    """Something asked for a host. Not an `Exception`, so that nobody takes it for a failure that may pass."""


def skeleton(folder: Folder) -> nn.Module:
    """The model that a head describes, its tensors on the meta device.

    Raises:
        CheckpointError: the head does not name a model of transformers, or its configuration cannot be used: it is
            malformed, describes more than the head can fill, or names something that would have to be fetched.
        MissingExtraError: transformers is not installed.
    """
    head = folder.head
    name = head.model.get("transformers")
    if name is None:
        raise CheckpointError(
            f"{folder.path} is not of a transformers model: give the module to fill, load(path, model=...)"
        )
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtraError('rebuilding this model needs transformers: pip install "foveate[cli]"') from error
    made_by: Any = getattr(transformers, str(name), None)
    pretrained: type = transformers.PreTrainedModel
    if not isinstance(made_by, type) or pretrained not in made_by.__mro__:
        raise CheckpointError(
            f"{folder.path}: {name!r} is not a model class of transformers {transformers.__version__}"
        )
    names, numbers, longest = _room(folder)
    try:
        with offline(), _at_most(names, numbers):
            config = cast(Any, made_by).config_class.from_dict(_plain(head.model["config"], max(longest, names)))
            config._name_or_path = str(folder.path)
            with torch.device("meta"):
                model: nn.Module = cast(Any, made_by)._from_config(config)
            cast(Any, model).tie_weights()  # transformers 5.0 does not, on the meta device
            generation = head.model.get("generation_config")
            if generation is not None and hasattr(model, "generation_config"):
                model.generation_config = transformers.GenerationConfig.from_dict(dict(generation))
            described = head.model.get("sentence_transformer")
            return model if described is None else assembled(model, described, folder.path)
    except FoveateError:
        raise
    except _Reached as reached:
        raise CheckpointError(
            f"{folder.path}: the configuration in its head names something that would have to be fetched ({reached}); "
            "a saved model is whole"
        ) from None
    except Exception as error:  # a library that was given a stranger's values raises whatever it likes
        raise CheckpointError(f"{folder.path}: the configuration in its head cannot be used: {error!r}") from error


def _room(folder: Folder) -> tuple[int, int, int]:
    """How many tensors the head names, how many numbers they have, and the longest dimension of one."""
    sites = folder.head.weight_sites()
    shapes = [entry.shape for entry in folder.part("rest").entries.values()]
    names = sum(1 + len(s.aliases) for s in sites) + len(shapes)
    numbers = sum((1 + len(s.aliases)) * s.rows * s.columns for s in sites) + sum(map(prod, shapes))
    longest = max([0, *(max(s.rows, s.columns) for s in sites), *(n for shape in shapes for n in shape)])
    return names, numbers, longest


def _plain(config: Any, most: int, key: str = "") -> Any:
    """A configuration without what would make transformers fetch or choose code: attention kernels, quantizers."""
    if isinstance(config, list):
        return [_plain(entry, most, key) for entry in config]
    if type(config) is int and abs(config) > (max(most, _MOST_COUNTED) if _COUNT.search(key) else _LARGEST):
        raise _TooLarge(f"{key} (={config}) is more than the head can fill")
    if not isinstance(config, dict):
        return config
    if set(config) == {"__float__"}:  # how transformers writes what JSON has no numbers for
        return float(config["__float__"])
    return {
        inner: _plain(v, most, inner)
        for inner, v in config.items()
        if inner.lstrip("_").removesuffix("_internal") not in _ODD
    }


@contextmanager
def _at_most(names: int, numbers: int) -> Iterator[None]:
    """Stop this thread from making modules beyond what so many tensors, of so many numbers together, can fill."""
    here = threading.get_ident()
    made = {"modules": 0, "tensors": 0, "numbers": 0}
    most = {
        "modules": _MODULES * names + _FEW,
        "tensors": _TIMES * names + _FEW,
        "numbers": _TIMES * numbers + (1 << 20),
    }

    def count(**more: int) -> None:
        if threading.get_ident() != here:
            return
        for what, n in more.items():
            made[what] += n
            if made[what] > most[what]:
                raise _TooLarge(f"it describes a model of more than {most[what]:,} {what}, which the head cannot fill")

    def tensor(_module: nn.Module, _name: str, value: Tensor | None) -> None:
        if value is not None:
            count(tensors=1, numbers=value.numel())

    def module(_module: nn.Module, _name: str, _value: nn.Module | None) -> None:
        count(modules=1)

    with ExitStack() as stack:
        for handle in (
            registration.register_module_parameter_registration_hook(tensor),
            registration.register_module_buffer_registration_hook(tensor),
            registration.register_module_module_registration_hook(module),
        ):
            stack.callback(handle.remove)
        yield


_LOOKED_UP = ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "gethostbyaddr", "getnameinfo")
_SENT = ("connect", "connect_ex", "sendto", "sendmsg")
_offline: dict[int, int] = {}
_before: list[tuple[Any, str, Any]] = []
_lock = threading.Lock()


@contextmanager
def offline() -> Iterator[None]:
    """In this thread, whatever looks up a host or connects to one is stopped there; other threads go on as they were.

    What a configuration makes a library fetch depends on the library and its release. All of it comes to Python's
    sockets in the end.
    """
    here = threading.get_ident()
    with _lock:
        _offline[here] = _offline.get(here, 0) + 1
        if len(_offline) == 1 and not _before:
            _guard()
    try:
        yield
    finally:
        with _lock:
            _offline[here] -= 1
            if not _offline[here]:
                del _offline[here]
            if not _offline:
                while _before:
                    owner, name, original = _before.pop()
                    setattr(owner, name, original)


def _guard() -> None:
    for owner, names in ((socket, _LOOKED_UP), (socket.socket, _SENT)):
        for name in names:
            original = getattr(owner, name)
            _before.append((owner, name, original))
            setattr(owner, name, _guarded(original, name))


def _guarded(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() in _offline:
            asked = [a for a in args if isinstance(a, (str, tuple))]
            raise _Reached(f"socket.{name} of {asked[0] if asked else '?'}")
        return original(*args, **kwargs)

    return call
