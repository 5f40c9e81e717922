"""PeakTracker: every storage alive during one training step, and which of them are payloads.

It sees the inputs and outputs of every operation. So it counts parameters, gradients, temporaries, payloads and
reconstructions, on all devices together, each from the first operation that uses it until it is freed. It does not see
inside an operation: the workspace of a convolution and the overhead of an allocator are not counted. Fake tensors are
counted as if they were real, so a model that does not fit in memory can be tracked too.

The bytes that a payload adds depend on what else holds the tensor that it was made of:

    packed            the original is dropped        unpacked                 released
      |  the model holds it  |  only the payload is there  |  the reconstruction too  |

A compressed payload adds its bytes throughout. A payload that is the tensor itself adds its bytes only in the middle
stretch, when nothing else holds the tensor. When an original is dropped can be seen if its payload is compressed. If
the payload is the original itself it cannot: then the last operation that reads the original before it is unpacked is
taken as the moment. Storages that existed before the step are taken to be held by others throughout.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from foveate.activations.memory.timeline import Span, Timeline


@dataclass(eq=False)
class _Storage:
    """A storage that is alive.

    Attributes:
        bytes: its size.
        existed_before: whether it existed before the step; others then hold it throughout.
        reference: tells when it is freed.
        owner: the payload that it holds, if it holds one.
        duplicate_of: the compressed payloads whose values it holds too, as their original or as a reconstruction.
    """

    bytes: int
    existed_before: bool
    reference: weakref.ref[torch.UntypedStorage]
    owner: Token | None = None
    duplicate_of: list[Token] = field(default_factory=list)


@dataclass(eq=False)
class Token:
    """One stored payload; `release` says that backward will not ask for it again.

    A payload also ends when its storages do, so only one that is its own original needs to be released.
    """

    site: str
    original: int
    exact: bool
    _tracker: weakref.ref[PeakTracker]
    bytes: int = 0  # of the storages that hold it
    owned: int = 0  # of those that only it holds, or will
    alive: bool = True
    used_at: int = -1  # of an exact one, where in the events it was last read before it was unpacked
    restored: bool = False
    storages: list[_Storage] = field(default_factory=list)
    duplicates: int = 0

    def release(self) -> None:
        """End it; does nothing the second time, or after the tracker has stopped."""
        tracker = self._tracker()
        if tracker is not None:
            tracker._end(self)


#: An event: the change of bytes that are no payload, a payload whose state changed, and its state: None where it was
#: freed, else whether only it holds the values.
_Event = tuple[int, Token | None, bool | None]


class PeakTracker(TorchDispatchMode):
    """Counts the bytes of every storage that is alive while it is entered, for one step.

    Args:
        tensors: what is alive before the step: parameters, buffers, optimizer state, the batch. What is missing here is
            counted from the start once an operation reads it.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, _Storage] = {}
        self._events: list[_Event] = []
        self._before = 0
        self._tokens: list[Token] = []
        self._open = True
        for tensor in tensors:
            self._see(tensor, new=False)

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._open = False
        self._storages.clear()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in inputs:
            self._see(tensor, new=False)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf, new=True)
        for tensor in inputs:
            self._see(tensor, new=False)  # an operation may have resized it
            for storage in self._known(tensor):
                if storage.owner is not None and storage.owner.exact and not storage.owner.restored:
                    storage.owner.used_at = len(self._events)
        return result

    # --- what the store says

    def stored(self, site: str, payload: Iterable[Tensor], original: Tensor) -> Token:
        """A payload was made of a saved tensor.

        Args:
            site: whose it is.
            payload: the tensors that hold it; the original itself, or a view of it, if it is kept as it is.
            original: the tensor that autograd saved.

        Returns:
            The payload's token.
        """
        self._see(original, new=False)
        duplicates = self._known(original)
        held: list[_Storage] = []
        for tensor in payload:
            self._see(tensor, new=True)
            held += [storage for storage in self._known(tensor) if storage not in held]
        size = original.numel() * original.element_size()
        token = Token(site, size, any(s in duplicates for s in held), weakref.ref(self))
        if not self._open:
            return token
        self._tokens.append(token)
        for storage in held:
            if storage.owner is None:  # else it is counted there
                token.bytes += storage.bytes
                if not (token.exact and storage.existed_before):
                    storage.owner = token
                    token.storages.append(storage)
                    token.owned += storage.bytes
        if not token.exact:
            for storage in duplicates:
                storage.duplicate_of.append(token)
            token.duplicates = len(duplicates)
            self._events.append((-token.owned, None, None))
        self._events.append((0, token, not (token.exact or token.duplicates)))
        token.used_at = len(self._events)
        return token

    def restored(self, token: Token, tensor: Tensor) -> None:
        """Backward asked for a payload and was given `tensor`."""
        if not (self._open and token.alive):
            return
        if token.exact:
            token.restored = True
            self._events.append((0, token, False))
            return
        self._see(tensor, new=True)
        for storage in self._known(tensor):
            if token not in storage.duplicate_of:
                storage.duplicate_of.append(token)
                token.duplicates += 1
        self._events.append((0, token, False))

    def timeline(self) -> Timeline:
        """What was recorded so far."""
        return _replay(self._before, self._with_last_uses(), self._tokens)

    # --- storages

    def _plain(self, tensor: Tensor) -> list[Tensor]:
        """The ordinary tensors that a tensor is made of; none of one that has no memory of its own."""
        if is_traceable_wrapper_subclass(tensor):
            names, _ = tensor.__tensor_flatten__()
            return [plain for name in names for plain in self._plain(getattr(tensor, name))]
        if tensor.layout == torch.strided:
            return [tensor]
        return [tensor._indices(), tensor._values()] if tensor.layout == torch.sparse_coo else []

    def _known(self, tensor: Tensor) -> list[_Storage]:
        keys = [plain.untyped_storage()._cdata for plain in self._plain(tensor)]
        return [self._storages[key] for key in keys if key in self._storages]

    def _see(self, tensor: Tensor, new: bool) -> None:
        """Count a tensor's storages, from now or from the start, and any change of their sizes."""
        if not self._open:
            return
        for plain in self._plain(tensor):
            storage = plain.untyped_storage()
            known = self._storages.get(storage._cdata)
            size = storage.nbytes()
            if known is None:
                reference = weakref.ref(storage, self._forgetter(storage._cdata))
                self._storages[storage._cdata] = _Storage(size, not new, reference)
                if new:
                    self._events.append((size, None, None))
                else:
                    self._before += size
            elif known.bytes != size:
                if known.owner is None or known.owner.exact:
                    self._events.append((size - known.bytes, None, None))
                known.bytes = size

    def _forgetter(self, key: int) -> Callable[[object], None]:
        tracker = weakref.ref(self)

        def forget(_: object) -> None:
            alive = tracker()
            if alive is not None and alive._open:
                alive._gone(alive._storages.pop(key))

        return forget

    def _gone(self, storage: _Storage) -> None:
        owner = storage.owner
        if owner is None:
            self._events.append((-storage.bytes, None, None))
        else:
            owner.storages.remove(storage)
            if owner.exact:
                self._events.append((-storage.bytes, None, None))
            if not owner.storages:
                self._end(owner)
        for token in storage.duplicate_of:
            token.duplicates -= 1
            if token.alive and not token.duplicates:
                self._events.append((0, token, True))

    def _end(self, token: Token) -> None:
        if not (token.alive and self._open):
            return
        token.alive = False
        self._events.append((0, token, None))
        for storage in token.storages:  # those that live on are no payload any more
            storage.owner = None
            if not token.exact:
                self._events.append((storage.bytes, None, None))

    def _with_last_uses(self) -> list[_Event]:
        """The events, with those of exact payloads put in: between the last use of the original and its return only the
        payload holds it.
        """
        inserted: dict[int, list[_Event]] = {}
        returned: set[Token] = set()
        for position, (_, token, sole_holder) in enumerate(self._events):
            if token is None or not token.exact or sole_holder or position < token.used_at or token in returned:
                continue
            returned.add(token)
            inserted.setdefault(position, []).append((token.owned, None, None))
        for token in self._tokens:
            if token.exact and token.owned:
                inserted.setdefault(token.used_at, [])[:0] = [(-token.owned, None, None), (0, token, True)]
        found: list[_Event] = []
        for position in range(len(self._events) + 1):
            found += inserted.get(position, [])
            found += self._events[position : position + 1]
        return found


def _replay(before: int, events: Iterable[_Event], tokens: Iterable[Token]) -> Timeline:
    stored: dict[str, int] = {}
    original: dict[str, int] = {}
    for made in tokens:
        stored[made.site] = stored.get(made.site, 0) + made.bytes
        original[made.site] = original.get(made.site, 0) + made.original
    other = [before]
    now = before
    spans: list[Span] = []
    state: dict[Token, tuple[int, bool]] = {}
    for delta, token, sole_holder in events:
        now += delta
        other[-1] = max(other[-1], now)
        if token is None or (token in state and state[token][1] is sole_holder):
            continue
        _close(spans, state, token, len(other), original)
        if sole_holder is not None:
            state[token] = (len(other), sole_holder)
        other.append(now)
    for unfinished in list(state):
        _close(spans, state, unfinished, len(other), original)
    return Timeline(tuple(other), tuple(spans), original, stored)


def _close(
    spans: list[Span], state: dict[Token, tuple[int, bool]], token: Token, end: int, original: Mapping[str, int]
) -> None:
    if token in state:
        start, sole_holder = state.pop(token)
        if end > start and original[token.site]:
            spans.append(Span(token.site, start, end, token.original / original[token.site], sole_holder))
