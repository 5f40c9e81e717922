"""A skeleton: a transformers model without weights, built from the configuration in the head of a folder.

The configuration may come from a stranger, so three limits hold while the model is built. Only code of transformers
runs. Nothing is fetched from a network. And the model is no larger than the folder can fill: each of its parameters and
buffers is either a weight on planes or in the file `rest`, so the head's names and sizes bound the number of modules.
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

#: Keys that are dropped: they would make transformers choose or fetch code or weights, or it never writes them.
_DROPPED = frozenset(
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
#: For each tensor that the folder has, so many may be registered (again when they are tied), and so many modules, since
#: modules with tensors come with modules that have none. To both limits `_ALLOWANCE` is added, for small models.
_TENSORS_FOR_EACH, _MODULES_FOR_EACH = 4, 32
_ALLOWANCE = 1000
#: Keys whose numbers transformers may loop up to, and their limit where no dimension in the head is larger.
_COUNT = re.compile(r"(^|_)(num|n|layers?|depths?|blocks?|labels|class(es)?|stages|heads|experts)(_|$)")
_MOST_COUNTED = 1 << 20
_LARGEST = 1 << 53


class _TooLarge(Exception):
    """A configuration describes a larger model than the folder can fill."""


class _NetworkUsed(BaseException):
    """Code tried to use the network. It is not an `Exception`, so that no library catches it and tries again."""


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
    except _NetworkUsed as used:
        raise CheckpointError(
            f"{folder.path}: the configuration in its head names something that would have to be fetched ({used}); "
            "a saved model is whole"
        ) from None
    except Exception as error:  # given a stranger's values, a library may raise anything
        raise CheckpointError(f"{folder.path}: the configuration in its head cannot be used: {error!r}") from error


def _room(folder: Folder) -> tuple[int, int, int]:
    """How many tensors the head names, how many numbers they have together, and the longest dimension of one."""
    sites = folder.head.weight_sites()
    shapes = [entry.shape for entry in folder.part("rest").entries.values()]
    names = sum(1 + len(s.aliases) for s in sites) + len(shapes)
    numbers = sum((1 + len(s.aliases)) * s.rows * s.columns for s in sites) + sum(map(prod, shapes))
    longest = max([0, *(max(s.rows, s.columns) for s in sites), *(n for shape in shapes for n in shape)])
    return names, numbers, longest


def _plain(config: Any, most: int, key: str = "") -> Any:
    """A configuration without the keys of `_DROPPED`; raises `_TooLarge` for numbers larger than `most`."""
    if isinstance(config, list):
        return [_plain(entry, most, key) for entry in config]
    if type(config) is int and abs(config) > (max(most, _MOST_COUNTED) if _COUNT.search(key) else _LARGEST):
        raise _TooLarge(f"{key} (={config}) is more than the head can fill")
    if not isinstance(config, dict):
        return config
    if set(config) == {"__float__"}:  # how transformers writes floats that JSON has no numbers for
        return float(config["__float__"])
    return {
        inner: _plain(v, most, inner)
        for inner, v in config.items()
        if inner.lstrip("_").removesuffix("_internal") not in _DROPPED
    }


@contextmanager
def _at_most(names: int, numbers: int) -> Iterator[None]:
    """Raise `_TooLarge` in this thread once it makes more modules than so many tensors, of so many numbers, can
    fill.
    """
    here = threading.get_ident()
    made = {"modules": 0, "tensors": 0, "numbers": 0}
    most = {
        "modules": _MODULES_FOR_EACH * names + _ALLOWANCE,
        "tensors": _TENSORS_FOR_EACH * names + _ALLOWANCE,
        "numbers": _TENSORS_FOR_EACH * numbers + (1 << 20),
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
    """Within this context, looking up a host or connecting to one raises in this thread; other threads are not
    affected.

    What a configuration makes a library fetch depends on the library and its release, but all of it uses Python's
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
            raise _NetworkUsed(f"socket.{name} of {asked[0] if asked else '?'}")
        return original(*args, **kwargs)

    return call
