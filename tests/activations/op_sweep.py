"""Every differentiable operator of torch's own test database, run as a small training step inside a store."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_utils import SEED
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils._pytree import tree_flatten, tree_unflatten

import foveate as fv

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
        torch.default_generator.manual_seed(7)
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


def names() -> set[str]:
    """Of all operators in the sweep."""
    return {_name(op) for op in op_db if _swept(op)}


def cases(share: int, shares: int, samples: int = 2) -> Iterator[Case]:
    """One share of the database: of each operator a few calls, and their in-place form."""
    for op, drawn in _drawn(share, shares):
        for sample in _spread(drawn, samples):
            yield _case(op, op.op, sample, _same, torch.float32)
            if op.inplace_variant is not None and op.supports_inplace_autograd:
                yield _case(op, op.inplace_variant, sample, _same, torch.float32)


def odd_cases(share: int, shares: int) -> Iterator[Case]:
    """One call of each operator with each kind of odd input."""
    for op, drawn in _drawn(share, shares):
        for change in (_with_gaps, _transposed, _expanded, _not_finite, _same):
            dtype = torch.float64 if change is _same else torch.float32
            if dtype in op.supported_dtypes("cpu"):
                yield _case(op, op.op, drawn[-1], change, dtype)


def _drawn(share: int, shares: int) -> Iterator[tuple[OpInfo, list[SampleInput]]]:
    for op in op_db[share::shares]:
        if _swept(op):
            yield op, list(itertools.islice(_samples(op), 24))


def _samples(op: OpInfo) -> Iterator[SampleInput]:
    """As `op.sample_inputs` draws them, but for its search of the whole stack for a test case of unittest."""
    _seed(0)
    made = iter(op.sample_inputs_func(op, "cpu", torch.float32, requires_grad=True))
    while True:
        _seed(SEED)
        try:
            yield next(made)
        except StopIteration:
            return


def _seed(seed: int) -> None:
    """Of all that operators and their samples draw from. `torch.manual_seed` writes the stack down three times."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


def _spread(drawn: list[SampleInput], count: int) -> list[SampleInput]:
    step = max(1, len(drawn) // count)
    return drawn[::step][:count]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _with_gaps(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], -1)[..., 0]


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() > 1 else tensor


def _expanded(tensor: Tensor) -> Tensor:
    return tensor[:1].expand_as(tensor) if tensor.dim() and tensor.numel() else tensor


def _not_finite(tensor: Tensor) -> Tensor:
    flat = torch.arange(tensor.numel()).view(tensor.shape) % 7
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=tensor.dtype)
    return torch.where(flat < 3, odd[flat.clamp_max(2)], tensor)


def _swept(op: OpInfo) -> bool:
    return bool(op.supports_autograd and torch.float32 in op.supported_dtypes("cpu"))


def _name(op: OpInfo) -> str:
    return op.name + ("." + op.variant_test_name if op.variant_test_name else "")


def _case(op: OpInfo, function: Callable[..., Any], sample: SampleInput, change: Change, dtype: torch.dtype) -> Case:
    arguments, spec = tree_flatten(((sample.input, *sample.args), sample.kwargs))
    places = [i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.requires_grad]
    if dtype == torch.float64:
        arguments = [a.double() if isinstance(a, Tensor) and a.dtype == torch.float32 else a for a in arguments]
    leaves = [arguments[i].detach().clone().requires_grad_() for i in places]
    plain = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    return Case(_name(op), function, leaves, plain, places, spec, change)


def inside(case: Case, default: int | None = None, **target: Any) -> list[Tensor | None]:
    """The case's gradients in a store with everything compressed that may be."""
    options = fv.ActivationOptions(smallest=1, group=32, default=default)
    with fv.compress_activations(nn.ParameterList([nn.Parameter(torch.zeros(1))]), **target, options=options):
        return case.gradients()


def same(wanted: list[Tensor | None], found: list[Tensor | None]) -> bool:
    """Bit for bit, NaN where there is NaN."""
    pairs = zip(wanted, found, strict=True)
    return all((w is None and f is None) or (w is not None and f is not None and _equal(w, f)) for w, f in pairs)


def _equal(wanted: Tensor, found: Tensor) -> bool:
    if wanted.layout != torch.strided:
        wanted, found = wanted.to_dense(), found.to_dense()
    same_values = ((wanted == found) | (wanted.isnan() & found.isnan())).all()
    return wanted.shape == found.shape and wanted.dtype == found.dtype and bool(same_values)


def finite(tensors: list[Tensor | None]) -> bool:
    """Whether no gradient has NaN or infinity."""
    return all(t is None or bool(t.to_dense().isfinite().all()) for t in tensors)
