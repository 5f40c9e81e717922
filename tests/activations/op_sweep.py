"""Every differentiable operator of torch's own test database, run as a small training step inside a store."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils._pytree import tree_flatten, tree_unflatten

import foveate as fv

#: Of those that draw random numbers only the ones that the seed does not fix: none at the moment.
NOT_DETERMINISTIC: dict[str, str] = {}

Change = Callable[[Tensor], Tensor]


@dataclass
class Case:
    """An operator, one call of it, and what is done to the tensors that it differentiates."""

    name: str
    function: Callable[..., Any]
    leaves: list[Tensor]
    arguments: list[Any]
    places: list[int]
    spec: Any
    change: Change

    def gradients(self) -> list[Tensor | None]:
        """Of the sum of all outputs, weighted at random. The operator sees no leaves, but activations."""
        torch.manual_seed(7)
        arguments = list(self.arguments)
        for place, leaf in zip(self.places, self.leaves, strict=True):
            arguments[place] = self.change(leaf * 1)
        args, kwargs = tree_unflatten(arguments, self.spec)
        outputs = tree_flatten(self.function(*args, **kwargs))[0]
        roots = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad]
        if not roots:
            return []
        weights = [torch.randn(o.shape, dtype=o.dtype) for o in roots]
        return list(torch.autograd.grad(roots, self.leaves, weights, allow_unused=True))


def names() -> list[str]:
    """Of all operators in the sweep, sorted."""
    return sorted({_name(op) for op in op_db if _swept(op)} - set(NOT_DETERMINISTIC))


def cases(share: int, shares: int, samples: int = 2) -> Iterator[Case]:
    """One share of the database: of each operator its first calls, its in-place form, and odd inputs."""
    for op in op_db[share::shares]:
        if not _swept(op) or _name(op) in NOT_DETERMINISTIC:
            continue
        torch.manual_seed(0)
        drawn = list(itertools.islice(op.sample_inputs("cpu", torch.float32, requires_grad=True), 24))
        for sample in _spread(drawn, samples):
            yield _case(op, op.op, sample, _same)
            if op.inplace_variant is not None and op.supports_inplace_autograd:
                yield _case(op, op.inplace_variant, sample, _same)


def _spread(drawn: list[SampleInput], count: int) -> list[SampleInput]:
    step = max(1, len(drawn) // count)
    return drawn[::step][:count]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _swept(op: OpInfo) -> bool:
    return bool(op.supports_autograd and torch.float32 in op.supported_dtypes("cpu"))


def _name(op: OpInfo) -> str:
    return op.name + ("." + op.variant_test_name if op.variant_test_name else "")


def _case(op: OpInfo, function: Callable[..., Any], sample: SampleInput, change: Change) -> Case:
    arguments, spec = tree_flatten(((sample.input, *sample.args), sample.kwargs))
    places = [i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.requires_grad]
    leaves = [arguments[i].detach().clone().requires_grad_() for i in places]
    plain = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    return Case(_name(op), function, leaves, plain, places, spec, change)


def inside(case: Case, **settings: Any) -> list[Tensor | None]:
    """The case's gradients in a store with everything compressed that may be."""
    with fv.compress_activations(nn.ParameterList([nn.Parameter(torch.zeros(1))]), smallest=1, group=32, **settings):
        return case.gradients()


def same(wanted: list[Tensor | None], found: list[Tensor | None]) -> bool:
    """Bit for bit, NaN where there is NaN."""
    pairs = zip(wanted, found, strict=True)
    return all((w is None and f is None) or (w is not None and f is not None and _equal(w, f)) for w, f in pairs)


def _equal(wanted: Tensor, found: Tensor) -> bool:
    if wanted.layout != torch.strided:
        wanted, found = wanted.to_dense(), found.to_dense()
    return wanted.shape == found.shape and bool(((wanted == found) | (wanted.isnan() & found.isnan())).all())


def finite(tensors: list[Tensor | None]) -> bool:
    """Whether no gradient has NaN or infinity."""
    return all(t is None or bool(t.to_dense().isfinite().all()) for t in tensors)
