"""Objectives: what a model's output is for, the loss whose increase is predicted, and the divergence that is measured.

Two kinds of output cover most models. Logits are a distribution, and their divergence is the KL divergence from the
reference. Any other output is an embedding, and its divergence is 1 - cosine. The loss is the inner product of the
output with a random normal direction whose covariance is the curvature of the divergence. The squared gradient of that
loss then estimates, without labels, twice what a change of the weights adds to the divergence. The curvature of logits
is the Fisher information (Kunstner et al., arXiv:1905.12558), that of unit embeddings the identity.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import DataError

#: How many values of an output are handled at a time.
_SLICE = 1 << 21


def run(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch: a mapping as keywords, a tuple or list as positions, else the one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        try:
            # a copy: sentence-transformers' modules write what they make into the mapping they are given
            return model(*(copy(part) if isinstance(part, Mapping) else part for part in batch))
        except TypeError as error:
            raise DataError(
                f"the model cannot be called on a batch that is a {type(batch).__name__} of {len(batch)} ({error}); "
                "if the batch holds labels too, hand on its inputs only"
            ) from error
    return model(batch)


def check_batches(batches: Iterable[Any]) -> Iterable[Any]:
    """The batches; `DataError` where they look like one batch, whose rows or keys would be taken for batches."""
    if isinstance(batches, (Tensor, Mapping, str)):
        raise DataError(f"batches is a {type(batches).__name__}: if that is one batch, give [batch]")
    return batches


def _field(output: Any, *names: str) -> Tensor:
    """The tensor in a model's output: the first named attribute or key it has, else itself, else the first of its
    elements that is a tensor with dimensions (a tuple often begins with a loss).
    """
    if isinstance(output, Tensor):
        if output.dim():
            return output
        raise DataError("the model's output is a single number, not rows to compare: call it without labels")
    parts = [_attribute(output, name) for name in names]
    if isinstance(output, (Mapping, tuple, list)):
        parts += output.values() if isinstance(output, Mapping) else output
    for part in parts:
        if isinstance(part, Tensor) and part.dim():
            return part
    raise DataError(f"the model's output is a {type(output).__name__} without a tensor of rows to measure")


def _attribute(output: Any, name: str) -> Any:
    """An output's attribute or, of a mapping, what is at the key; None without either."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _real(batch: Any, rows: Tensor) -> Tensor:
    """`rows` [B, S, D] flattened to [n, D] without padding, as the batch's attention mask has it."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and rows.dim() == 3 and mask.shape == rows.shape[:2]:
        return rows[mask.bool()]
    return rows.reshape(-1, rows.shape[-1])


class _InnerProduct(torch.autograd.Function):
    """The inner product of an output with a direction, which is its gradient: nothing else of that size is made."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, direction: Tensor) -> Tensor:
        """Classes that the model rules out have logits of -inf, and no direction."""
        ctx.save_for_backward(direction)
        rows = max(1, _SLICE // max(output.shape[1], 1))
        pairs = zip(output.split(rows), direction.split(rows), strict=True)
        parts = [(torch.where(d == 0, 0.0, y) * d).sum() for y, d in pairs]
        return torch.stack(parts).sum() if parts else output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The direction, as often as the product counts."""
        (direction,) = ctx.saved_tensors
        (by,) = gradients
        return (direction if float(by) == 1.0 else direction * by), None


def _inner_product(output_nC: Tensor, direction_nC: Tensor) -> Tensor:
    product: Tensor = _InnerProduct.apply(output_nC, direction_nC)  # type: ignore[no-untyped-call]
    return product


class Objective(ABC):
    """What should stay the same when precision falls."""

    name: str
    #: The divergence and its unit, as text.
    unit: str
    #: Whether the rows of one sample (the tokens of a text) have independent labels, so that their gradients are
    #: uncorrelated.
    independent_rows: bool

    @abstractmethod
    def loss(self, output: Any, batch: Any, generator: torch.Generator) -> tuple[Tensor, int]:
        """(sum over samples of a loss whose squared gradient measures sensitivity, number of samples)."""

    @abstractmethod
    def outcome(self, output: Any, batch: Any) -> Tensor:
        """The part of the output that is compared, float32 [n, D], one row for each sample."""

    @abstractmethod
    def divergence(self, reference_nD: Tensor, outcome_nD: Tensor) -> Tensor:
        """The distance of each sample's outcome from the reference, [n]; 0 if they are equal."""

    @abstractmethod
    def agreement(self, reference_nD: Tensor, outcome_nD: Tensor) -> Tensor:
        """Whether each sample's decision is that of the reference, bool [n]."""


@final
class Logits(Objective):
    """Outputs are logits over classes or tokens, the last dimension; divergence in nats."""

    name = "logits"
    unit = "KL, nats"
    independent_rows = True

    def outcome(self, output: Any, batch: Any) -> Tensor:
        """Logits [n, classes], padding left out."""
        return _real(batch, _field(output, "logits")).float()

    def loss(self, output: Any, batch: Any, generator: torch.Generator) -> tuple[Tensor, int]:
        """Inner product of the logits with a random normal direction v whose covariance is diag(p) - p p^T.

        This covariance is the Fisher information of the logits. Labels sampled from the model have it too, but with a
        higher variance: a confident model samples one label almost always, and the few others decide the estimate.
        With z standard normal, v = sqrt(p) z - p (sqrt(p) . z).
        """
        logits_nC = self.outcome(output, batch)
        direction_nC = torch.empty_like(logits_nC, requires_grad=False)
        rows = max(1, _SLICE // max(logits_nC.shape[1], 1))
        for logits, direction in zip(logits_nC.detach().split(rows), direction_nC.split(rows), strict=True):
            p = logits.softmax(-1)
            root = p.sqrt()
            root.mul_(torch.randn(p.shape, generator=generator))
            torch.addcmul(root, p, root.sum(-1, keepdim=True), value=-1.0, out=direction)
        return _inner_product(logits_nC, direction_nC), len(logits_nC)

    def divergence(self, reference_nD: Tensor, outcome_nD: Tensor) -> Tensor:
        """KL(reference || outcome) in nats."""
        reference = reference_nD.log_softmax(-1)
        return (reference.exp() * (reference - outcome_nD.log_softmax(-1))).sum(-1)

    def agreement(self, reference_nD: Tensor, outcome_nD: Tensor) -> Tensor:
        """Whether the most likely class is the same."""
        return reference_nD.argmax(-1) == outcome_nD.argmax(-1)


@final
class Embedding(Objective):
    """Outputs are vectors that are compared by their angle; the divergence is 1 - cosine."""

    name = "embedding"
    unit = "1 - cosine"
    independent_rows = False

    def outcome(self, output: Any, batch: Any) -> Tensor:
        """Vectors [n, D], padding left out."""
        names = ("embeddings", "sentence_embedding", "pooler_output", "last_hidden_state")
        return _real(batch, _field(output, *names)).float()

    def loss(self, output: Any, batch: Any, generator: torch.Generator) -> tuple[Tensor, int]:
        """Inner product of the unit vector with a random normal direction: its squared gradient is, on average, the
        squared change of the unit vector.
        """
        unit = F.normalize(self.outcome(output, batch), dim=-1)
        return (unit * torch.randn(unit.shape, generator=generator)).sum(), len(unit)

    def divergence(self, reference_nD: Tensor, outcome_nD: Tensor) -> Tensor:
        """1 - cosine."""
        return 1 - F.cosine_similarity(reference_nD, outcome_nD, dim=-1)

    def agreement(self, reference_nD: Tensor, outcome_nD: Tensor) -> Tensor:
        """Whether the nearest neighbour among the samples of the batch is the same."""
        if len(reference_nD) < 2:
            return torch.ones(len(reference_nD), dtype=torch.bool)

        def neighbour(v_nD: Tensor) -> Tensor:
            unit = F.normalize(v_nD, dim=-1)
            return (unit @ unit.t()).fill_diagonal_(-2).argmax(1)

        return neighbour(reference_nD) == neighbour(outcome_nD)


@final
class Custom(Objective):
    """A loss of the user, `loss(output, batch) -> scalar sum`; the divergence is that of the objective `of`."""

    def __init__(self, loss: Callable[[Any, Any], Tensor], of: Objective) -> None:
        self._loss, self._of = loss, of
        self.name, self.unit, self.independent_rows = f"custom over {of.name}", of.unit, False

    def loss(self, output: Any, batch: Any, generator: torch.Generator) -> tuple[Tensor, int]:
        """The user's loss."""
        return self._loss(output, batch), len(self.outcome(output, batch))

    def outcome(self, output: Any, batch: Any) -> Tensor:
        """As `of` has it."""
        return self._of.outcome(output, batch)

    def divergence(self, reference_nD: Tensor, outcome_nD: Tensor) -> Tensor:
        """As `of` has it."""
        return self._of.divergence(reference_nD, outcome_nD)

    def agreement(self, reference_nD: Tensor, outcome_nD: Tensor) -> Tensor:
        """As `of` has it."""
        return self._of.agreement(reference_nD, outcome_nD)


def named(name: str) -> Objective | None:
    """The objective of a profile by its name; for a custom loss the objective that it was made over."""
    known = {objective.name: objective for objective in (Logits(), Embedding())}
    return known.get(name.removeprefix("custom over "))


def infer(output: Any) -> Objective:
    """`Logits` if the output has logits, else `Embedding`."""
    return Logits() if isinstance(_attribute(output, "logits"), Tensor) else Embedding()
