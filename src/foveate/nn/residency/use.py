"""Use: how often experts and rows of embeddings are read, relative to calibration, which their importance counts on.

An expert that is routed to twice as often as in calibration is worth twice as much of memory, and so are the rows of an
embedding. Layers that every token reads need no count. Embeddings have a hook that stays. Experts have theirs during
one pass in `COUNT_EVERY`: a hook within a decoder's block has its blocks computed one by one.

Shapes: NT strips of a weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from foveate.formats.packing import TILE_ROWS
from foveate.memory.runs import Run
from foveate.nn.modules import PlaneEmbedding
from foveate.nn.plane_module import PlaneModule
from foveate.nn.residency.pass_gate import EagerHook
from foveate.precision.maps import Site

#: One pass in so many counts the rows of experts.
COUNT_EVERY = 16


class UseCounter:
    """Counts what reads experts and embeddings.

    Attributes:
        counts: whether there is anything to count.
    """

    def __init__(
        self, sites: Sequence[Site], modules: Mapping[str, PlaneModule], row_frequency: Mapping[str, Tensor]
    ) -> None:
        """Find the modules whose weights not every token reads whole, and put hooks on embeddings.

        Args:
            sites: the weight sites.
            modules: for each such site the one module that has its weight; sites of several modules are left out.
            row_frequency: for embeddings, the share of look-ups that read each strip in calibration, float32 [NT].
        """
        self._sites = {s.name: s for s in sites if s.name in modules and 0 < s.rows_read < s.rows}
        self._row_frequency = row_frequency
        self._rows: dict[str, float] = {}
        self._strips: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        self._experts: list[tuple[PlaneModule, EagerHook]] = []
        self._expert_hooks: list[RemovableHandle] = []
        self._passes = 0
        for name in self._sites:
            module = modules[name]
            if isinstance(module, PlaneEmbedding):
                if name not in row_frequency:
                    continue
                self._strips[name] = torch.zeros(self._sites[name].grid[0], dtype=torch.float64)
                self._hooks.append(module.register_forward_pre_hook(EagerHook(_Count(self, name))))
            else:
                self._rows[name] = 0.0
                self._experts.append((module, EagerHook(_Count(self, name))))
        self.counts = bool(self._hooks or self._experts)

    def begin_pass(self) -> None:
        """A pass of the model begins."""
        self._passes += 1
        if self._experts and self._passes % COUNT_EVERY == 1 and not self._expert_hooks:
            self._expert_hooks = [module.register_forward_pre_hook(hook) for module, hook in self._experts]

    def end_pass(self) -> None:
        """A pass of the model has ended."""
        hooks, self._expert_hooks = self._expert_hooks, []
        for hook in hooks:
            hook.remove()

    def add(self, name: str, x: Tensor) -> None:
        """Note what a module is called with."""
        if name in self._strips:
            strips = self._strips[name]
            strips += torch.bincount(x.reshape(-1) // TILE_ROWS, minlength=len(strips))[: len(strips)]
        else:
            self._rows[name] += x.numel() / max(x.shape[-1], 1)

    def rates(self, runs: Sequence[Run]) -> list[float]:
        """For each run how often it was read since the last call, relative to calibration; 1 where nothing is known."""
        rate_of = self._expert_rates()
        strip_rates = {name: self._strip_rates(name) for name, seen in self._strips.items() if float(seen.sum())}
        found = []
        for run in runs:
            if run.weight in strip_rates:
                found.append(float(strip_rates[run.weight][run.first : run.last].mean()))
            else:
                found.append(rate_of.get(run.weight, 1.0))
        self._rows = dict.fromkeys(self._rows, 0.0)
        for seen in self._strips.values():
            seen.zero_()
        return found

    def _expert_rates(self) -> dict[str, float]:
        """Rows of each expert over those that its share in calibration gives of what all experts of its layer had."""
        layers: dict[str, list[str]] = {}
        for name in self._rows:
            path = name.split(".")  # model.layers.3.mlp.experts.5.down_proj:weight: the same projection of all experts
            layers.setdefault(".".join((*path[:-2], path[-1])), []).append(name)
        rates: dict[str, float] = {}
        for names in layers.values():
            rows = sum(self._rows[name] for name in names)
            shares = {name: self._sites[name].rows_read / self._sites[name].rows for name in names}
            whole = sum(shares.values())
            if rows:
                rates.update({name: self._rows[name] / rows * whole / shares[name] for name in names})
        return rates

    def _strip_rates(self, name: str) -> Tensor:
        seen = self._strips[name] / self._strips[name].sum()
        expected = self._row_frequency[name].double()
        # rows that calibration never saw count as if it had seen them once in 1/NT of the look-ups
        return seen / torch.maximum(expected / expected.sum().clamp_min(1e-30), torch.tensor(1.0 / len(expected)))

    def end(self) -> None:
        """Take the hooks off."""
        self.end_pass()
        for hook in self._hooks:
            hook.remove()


class _Count:
    """A forward pre-hook that counts for one weight."""

    def __init__(self, counter: UseCounter, name: str) -> None:
        self._counter, self._name = counter, name

    def __call__(self, module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor):
            self._counter.add(self._name, args[0])


def alone(model: nn.Module) -> dict[str, PlaneModule]:
    """For each weight that only one module has, this module."""
    modules: dict[str, list[PlaneModule]] = {}
    for module in model.modules():
        if isinstance(module, PlaneModule):
            modules.setdefault(module.weight.name, []).append(module)
    return {name: found[0] for name, found in modules.items() if len(found) == 1}
