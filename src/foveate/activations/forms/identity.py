"""Which saved tensors are one and the same, which are parameters, and whether one was changed in place.

**The same.** Autograd saves views: q, k and v of one projection, a matrix and its transpose. What is stored is
therefore an interval of a storage at a version: `Interval`, found again through `StorageIndex`. An address alone does
not identify a storage, for memory is used again. The index holds a weak reference to each storage, which keeps its
address from being used for another.

**Parameters** are never stored: the model holds them anyway. Comparing pointers does not find them all, since autocast
makes copies and FSDP hands out other tensors. So `parameter_of` walks from a tensor through views and casts to a leaf
that accumulates a gradient.

**Changed in place.** Any pack hook switches off autograd's own check of versions. `version_probe` shares a tensor's
version counter without holding its memory, so the store makes the check itself when backward asks for the tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

T = TypeVar("T")

#: Names, without `Backward0`, of autograd nodes whose results share the memory of their input.
_VIEWS = frozenset(
    (
        *("T", "Transpose", "View", "Permute", "Unsqueeze", "Squeeze", "Expand", "Alias", "ReshapeAlias", "Slice"),
        *("UnsafeView", "AsStrided", "Select", "Detach", "Diagonal", "Unfold", "Split", "SplitWithSizes", "Unbind"),
    )
)
_CASTS = frozenset(("ToCopy",))
_NOTHING = torch.empty(0)


def version_probe(tensor: Tensor) -> Tensor:
    """An empty tensor whose `_version` is the tensor's, now and later."""
    with torch.no_grad():
        shared = tensor.detach()
        shared.data = _NOTHING
    return shared


@dataclass(frozen=True)
class Origin:
    """The parameter that a saved tensor is, or is a cast copy of.

    Attributes:
        parameter: the leaf.
        views_only: whether it shares the parameter's memory.
    """

    parameter: Tensor
    views_only: bool


def parameter_of(tensor: Tensor) -> Origin | None:
    """The parameter that a tensor is a view or a cast of, found through `grad_fn`; None of activations."""
    if tensor.is_leaf:
        return Origin(tensor, True) if tensor.requires_grad else None
    node, views_only = tensor.grad_fn, True
    for _ in range(8):
        if node is None:
            return None
        name = node.name().rstrip("0123456789").removesuffix("Backward")
        if name == "torch::autograd::AccumulateGrad":
            leaf: Tensor = node.variable  # type: ignore[attr-defined]  # of AccumulateGrad
            return Origin(leaf, views_only)
        if name in _CASTS:
            views_only = False
        elif name not in _VIEWS:
            return None
        node = node.next_functions[0][0]
    return None


@dataclass(frozen=True)
class Interval:
    """What of a storage a tensor occupies.

    Attributes:
        start, length: in values of the tensor's dtype.
        dense: whether to store the whole interval, which holds for a tensor with at least as many values, where values
            repeated by a stride of 0 count once. (An overlapping tensor may still leave out some of the interval.)
    """

    start: int
    length: int
    dense: bool


def interval_of(tensor: Tensor) -> Interval:
    """The interval of its storage that a strided tensor occupies."""
    length, distinct = 1, 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if size == 0:
            return Interval(int(tensor.storage_offset()), 0, True)
        if stride and size > 1:
            length += (size - 1) * stride
            distinct *= size
    return Interval(int(tensor.storage_offset()), length, distinct >= length)


def without_repeats(tensor: Tensor) -> Tensor:
    """The tensor with dimensions of stride 0 cut to one value."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


@dataclass
class _IndexedStorage(Generic[T]):
    storage: StorageWeakRef
    items: list[tuple[Interval, torch.dtype, int, weakref.ref[T]]]


class StorageIndex(Generic[T]):
    """Finds the items that store parts of a storage.

    The index holds items by weak references. Autograd's graph owns them, and they are freed with it.
    """

    def __init__(self) -> None:
        self._by_storage: dict[int, _IndexedStorage[T]] = {}

    def __len__(self) -> int:
        return sum(len(indexed.items) for indexed in self._by_storage.values())

    @property
    def empty(self) -> bool:
        """Whether no item is alive."""
        return not self._by_storage

    def find(self, tensor: Tensor, interval: Interval, fits: Callable[[T], bool]) -> T | None:
        """An item that covers the interval, has the tensor's version and dtype, and satisfies `fits`; else None."""
        indexed = self._by_storage.get(tensor.untyped_storage()._cdata)
        if indexed is None:
            return None
        end = interval.start + interval.length
        for held, dtype, version, reference in indexed.items:
            if (
                version == tensor._version
                and dtype == tensor.dtype
                and held.start <= interval.start
                and end <= held.start + held.length
                and (held.dense or held == interval)
            ):
                item = reference()
                if item is not None and fits(item):
                    return item
        return None

    def put(self, tensor: Tensor, interval: Interval, item: T) -> None:
        """Add an item that stores the interval of the tensor's storage. It is removed when it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        indexed = self._by_storage.get(key)
        if indexed is None:
            indexed = self._by_storage[key] = _IndexedStorage(StorageWeakRef(storage), [])

        def forget(reference: weakref.ref[T]) -> None:
            indexed.items[:] = [entry for entry in indexed.items if entry[3] is not reference]
            if not indexed.items and self._by_storage.get(key) is indexed:
                del self._by_storage[key]

        indexed.items.append((interval, tensor.dtype, tensor._version, weakref.ref(item, forget)))
