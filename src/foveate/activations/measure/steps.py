"""One step of training as the store sees it: its measurements, and the extra backward passes that they need.

A step begins with the first tensor that is saved and ends with its backward. Most steps only store. A **profiled** step
also measures variances and gradients at each site. A **probed** step holds two roundings of the sites of some families
and runs backward once more for each family, reading the second rounding there. An **audited** step holds the exact
tensors beside the rounded ones and runs backward once more with them: the difference is the true error. Extra passes go
through `torch.autograd.grad`, which touches neither `.grad` nor the hooks that synchronise processes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from foveate.activations.forms.encodings import GROUPED_LEVELS, Encoding, Recomputed
from foveate.activations.measure.ledger import Family, Ledger, Site, family_of
from foveate.activations.measure.metric import Relative, Weights

#: The name of the extra pass that reads the exact tensors; other passes have the name of a family.
EXACT = "exact"


@dataclass
class Record:
    """What a profiled step measures of one stored tensor.

    Attributes:
        site: the tensor's site.
        variance_LQ: of stochastic rounding, at each grouped level and for each group.
        group: values in each group.
        level, other: of the stored rounding and of the second rounding; 32 where there is none.
        closed: its closed-form errors so far, [L], by the key of the weight whose gradient has them.
        gradient: the mean square of the gradients of its consumers' outputs, summed over them.
        watched: whether hooks see every gradient that comes back to its consumers.
    """

    site: Site
    variance_LQ: Tensor
    group: int
    level: int = 32
    other: int = 32
    closed: dict[int, Tensor] = field(default_factory=dict)
    gradient: Tensor | None = None
    watched: bool | None = None

    def watch(self, all_outputs: bool) -> None:
        """One consumer's outputs have hooks, all of them or only some."""
        self.watched = all_outputs and self.watched is not False

    def add_closed(self, key: int, error_L: Tensor) -> None:
        """Add one consumer's E ||err dW||^2, by the key of its weight."""
        self.closed[key] = self.closed[key] + error_L if key in self.closed else error_L

    def add_gradient(self, mean_square: Tensor) -> None:
        """Add one consumer's mean squared gradient."""
        self.gradient = mean_square if self.gradient is None else self.gradient + mean_square

    def local_L(self) -> Tensor | None:
        """Variance times squared gradient, at each grouped level."""
        if self.gradient is None:
            return self._nothing()
        return self.variance_LQ.double().sum(1) * self.gradient

    def error_L(self, weights: Weights) -> Tensor | None:
        """The closed-form error, at each grouped level."""
        if not self.closed:
            return self._nothing()
        return torch.stack([weights.of(key) * error_L.double() for key, error_L in self.closed.items()]).sum(0)

    def _nothing(self) -> Tensor | None:
        """An error of 0 where hooks saw no gradient: the loss does not depend on the tensor. None without hooks."""
        return self.variance_LQ.new_zeros(len(self.variance_LQ)) if self.watched else None

    def probed(self) -> float:
        """The local error that two backward passes with the step's rounding and the other differ by."""
        local_L = self.local_L()
        if local_L is None:
            return 0.0
        at = dict(zip(GROUPED_LEVELS, local_L.tolist(), strict=True))
        return float(at.get(self.level, 0.0) + at.get(self.other, 0.0))


@dataclass
class StoredSite:
    """What a step stores at one site: bytes before and after, and the form and level of the last tensor."""

    original: int
    held: int
    form: str
    level: int


@dataclass
class Step:
    """One forward and backward.

    Attributes:
        number: counted from 0.
        profiled, audited: whether it measures, and whether it holds the exact tensors too.
        probed: the families that it holds a second rounding of.
        predicted: the relative error that the ledger predicts for it; NaN while sites are unmeasured.
        records: of a profiled step, one for each stored tensor.
        original: bytes of the storages that plain training would hold, each counted once; parameters are not.
        sites: what is stored, by site.
        compiled: the sites whose tensors a function made by `torch.compile` reads in backward.
        begun, over: whether a backward has begun, and whether one is over. Later backwards are not measured.
        audit: the error that an audit measured.
    """

    number: int
    profiled: bool = False
    audited: bool = False
    probed: tuple[str, ...] = ()
    predicted: float = float("nan")
    records: list[Record] = field(default_factory=list)
    original: int = 0
    sites: dict[str, StoredSite] = field(default_factory=dict)
    compiled: set[str] = field(default_factory=set)
    begun: bool = False
    over: bool = False
    audit: float | None = None
    _parameters: Mapping[str, Tensor] = field(default_factory=dict)
    _references: dict[str, list[Tensor | None]] = field(default_factory=dict)
    _energy: dict[str, Tensor] = field(default_factory=dict)
    _differences: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    _handles: list[RemovableHandle] = field(default_factory=list)

    @property
    def wants_passes(self) -> bool:
        """Whether it needs extra backward passes."""
        return self.audited or bool(self.probed)

    @property
    def held(self) -> int:
        """Bytes held, measurements aside."""
        return sum(kept.held for kept in self.sites.values())

    @property
    def held_compiled(self) -> int:
        """Bytes held exactly for compiled functions."""
        found = (self.sites[site] for site in self.compiled if site in self.sites)
        return sum(kept.held for kept in found if kept.form == "exact")

    def stored(self, site: str, original: int, encoding: Encoding) -> None:
        """A tensor was stored."""
        before = self.sites.get(site)
        self.sites[site] = StoredSite(
            original + (before.original if before else 0),
            encoding.bytes + (before.held if before else 0),
            "recomputed" if isinstance(encoding, Recomputed) else type(encoding).__name__.lower(),
            encoding.level,
        )

    def run_passes(
        self,
        roots: Sequence[Tensor],
        gradients: Sequence[Tensor | None] | None,
        parameters: Sequence[Tensor],
        reading: Callable[[str], None],
    ) -> bool:
        """Run backward once more for each measurement, and keep the gradients; False if this graph does not allow it.

        Args:
            roots, gradients: of the step's own backward.
            parameters: the leaves whose gradients count.
            reading: called with a family's name, or with `EXACT`, before its pass, and with an empty string at the end.
        """
        try:
            for name in (*self.probed, *((EXACT,) if self.audited else ())):
                reading(name)
                self._references[name] = list(
                    torch.autograd.grad(roots, parameters, gradients, retain_graph=True, allow_unused=True)
                )
        except RuntimeError as error:
            self._references.clear()
            warnings.warn(
                f"errors of gradients cannot be probed or audited: {str(error).splitlines()[0]}",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        finally:
            reading("")
        return True

    def begin(self, parameters: Mapping[str, Tensor]) -> None:
        """Backward begins: register hooks on the parameters' gradients."""
        self.begun = True
        if self.profiled or self._references:
            self._parameters = parameters
            for index, (name, parameter) in enumerate(parameters.items()):
                if not parameter.numel():
                    continue  # no error can be relative to it
                self._handles.append(parameter.register_hook(self._watcher(index, name, id(parameter))))

    def _watcher(self, index: int, name: str, key: int) -> Callable[[Tensor], None]:
        def watch(gradient: Tensor) -> None:
            dense = _strided(gradient.detach())
            size = dense  # errors are relative to the exact gradient where there is one
            for family, references in self._references.items():
                reference = references[index]
                if reference is not None:
                    other = _strided(reference)
                    self._differences.setdefault(family, {})[key] = (dense - other).abs().float().square().sum()
                    references[index] = None
                    size = other if family == EXACT else size
            self._energy[name] = size.abs().float().square().sum()

        return watch

    def finish(self, ledger: Ledger) -> None:
        """Backward is over: write the measurements to the ledger."""
        self.drop()
        self.over = True
        weights = self._weights(ledger.relative_to)
        if weights is not None:
            if self.profiled:
                self._write_records(ledger, weights)
            self._write_probes(ledger, weights)
            if EXACT in self._differences:
                self.audit = self._difference(EXACT, weights) ** 0.5
                ledger.audits.add(self.predicted, self.audit)
        self.records.clear()

    def _weights(self, relative_to: Relative) -> Weights | None:
        """The weights of the parameters that have a gradient; None where all are 0, or one is infinite."""
        if not self._energy:
            return None
        energy_T = torch.stack(list(self._energy.values())).double().cpu()
        if not 0 < float(energy_T.sum()) < math.inf:
            return None
        parameters = [self._parameters[name] for name in self._energy]
        count_T = torch.tensor([parameter.numel() for parameter in parameters])
        return Weights(list(self._energy), [id(p) for p in parameters], energy_T, count_T, relative_to)

    def _difference(self, name: str, weights: Weights) -> float:
        """The weighted square of what one pass's gradient and the step's differ by."""
        found = self._differences[name]
        return weights.error(dict(zip(found, torch.stack(list(found.values())).double().tolist(), strict=True)))

    def drop(self) -> None:
        """Remove the hooks, and free the gradients of extra passes."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._references.clear()

    def _write_records(self, ledger: Ledger, weights: Weights) -> None:
        closed: dict[str, Tensor] = {}
        local: dict[str, Tensor] = {}
        for record in self.records:
            name = record.site.name
            error_L = record.error_L(weights)
            if record.site.closed and error_L is not None:
                closed[name] = closed.get(name, torch.zeros(())) + error_L
            found = record.local_L()
            if not record.site.closed and found is not None:
                local[name] = local.get(name, torch.zeros(())) + found * weights.near(record.site.layer)
        for name, total_L in closed.items():
            ledger.sites[name].errors.append(_known(total_L))
        for name, total_L in local.items():
            ledger.sites[name].local.append(_known(total_L))

    def _write_probes(self, ledger: Ledger, weights: Weights) -> None:
        for name in self.probed:
            family: Family = ledger.families.setdefault(name, ledger.new_family())
            family.probed_at = self.number
            open_ones = [r for r in self.records if not r.site.closed and family_of(r.site.name) == name]
            local = sum(record.probed() * weights.near(record.site.layer) for record in open_ones)
            if local > 0 and name in self._differences:
                family.transfer.append(self._difference(name, weights) / local)


def _strided(gradient: Tensor) -> Tensor:
    """A gradient as an ordinary tensor; that of an embedding may be sparse."""
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


def _known(error_L: Tensor) -> Tensor:
    """An error, infinite where its parts were too large for float32."""
    return error_L.double().nan_to_num(nan=math.inf, posinf=math.inf)


def arguments_of_backward(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[Tensor], list[Tensor | None] | None] | None:
    """The roots of a call of backward and their gradients; None of a call that extra passes should not precede (a graph
    of the gradient, or chosen inputs).
    """
    if kwargs.get("create_graph") or kwargs.get("inputs") is not None or len(args) > 3:
        return None
    roots = args[0] if args else kwargs.get("tensors")
    gradients = args[1] if len(args) > 1 else kwargs.get("gradient", kwargs.get("grad_tensors"))
    if roots is None:
        return None
    several = isinstance(roots, Sequence)
    listed = list(roots) if several else [roots]
    if gradients is None:
        return listed, None
    return listed, list(gradients) if isinstance(gradients, Sequence) else [gradients]
