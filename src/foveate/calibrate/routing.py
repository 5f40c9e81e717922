"""Routing: how often calibration met each expert of a mixture.

The rows of an expert are those routed to it, so its statistics count it as often as it is used. An expert that was
never routed to has no statistics, and would look as if it cost nothing. It is treated as the average expert of its
layer, met half a time. Its cost is then low but not zero, and the lower the more data there were. (`collect.statistics`
has the same rule for tokens that were never met.) No inputs are known for its rounding, so it is rounded to nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveate.collect.collector import Collector
from foveate.collect.statistics import Factored
from foveate.nn.experts import PlaneExperts

#: How often an expert that was never met is counted.
_UNSEEN_COUNT = 0.5


class Routing:
    """How often each expert was routed to, and the statistics that replace those of experts that never were.

    `name in routing` says whether a module is a projection of an expert.
    """

    def __init__(self, model: nn.Module, collector: Collector) -> None:
        self._collector = collector
        # for each projection of an expert: the layer, the expert's number, and the same projection of all of them
        self._places: dict[str, tuple[str, int, list[str]]] = {}
        self._routes: dict[str, float | None] = {}
        self._average: dict[tuple[str, str], Factored | Tensor | None] = {}
        for layer, module in model.named_modules():
            if not isinstance(module, PlaneExperts):
                continue
            self._routes[layer] = module.routes
            for part in (module.up, "down_proj"):
                names = [f"{layer}.{i}.{part}" for i in range(module.num_experts)]
                known = [name for name in names if name in collector.by_module]
                self._places.update({n: (layer, i, known) for i, n in enumerate(names) if n in collector.by_module})

    @property
    def samples(self) -> int:
        """How many samples calibration saw."""
        return self._collector.samples

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def _rows(self, name: str) -> float:
        return float(self._collector.by_module[name].tensors["rows"])

    def share(self, name: str) -> float:
        """The share of tokens that are multiplied with this module's weight; 1 for a module that is no expert."""
        if name not in self._places:
            return 1.0
        layer, _, known = self._places[name]
        routes, total = self._routes[layer], sum(map(self._rows, known))
        return min(1.0, self._rows(name) * routes / total) if routes and total else 1.0

    def fisher(self, name: str) -> Tensor | Factored:
        """F of a module for one sample; for an expert that was never routed to, the average of its layer."""
        samples = self._collector.samples
        own = self._collector.by_module[name].fisher(samples)
        if name not in self._places or self._rows(name):
            return own
        layer, _, known = self._places[name]
        key = (layer, name.rpartition(".")[2])
        if key not in self._average:
            self._average[key] = self._average_of([n for n in known if self._rows(n)])
        average = self._average[key]
        return own if average is None else average

    def _average_of(self, met: list[str]) -> Factored | Tensor | None:
        """F of the average expert met half a time; None if none was met."""
        samples = self._collector.samples
        others = [(self._collector.by_module[n].fisher(samples), _UNSEEN_COUNT / self._rows(n)) for n in met]
        whole = [f * weight for f, weight in others if isinstance(f, Tensor)]
        factors = [(f, weight) for f, weight in others if isinstance(f, Factored)]
        if whole:
            return torch.stack(whole).mean(0)
        if not factors:
            return None
        return Factored(
            torch.stack([f.gradient_N * weight for f, weight in factors]).mean(0),
            torch.stack([f.energy_K for f, _ in factors]).mean(0),
        )

    def statistics(self, name: str) -> dict[str, Tensor]:
        """`routing_frequency`, float32 [1]: the share of tokens routed to an expert; nothing for other modules."""
        return {"routing_frequency": torch.tensor([self.share(name)])} if name in self._places else {}

    def notes(self) -> list[str]:
        """A sentence for each layer with experts that were never routed to."""
        missed: dict[str, set[int]] = {}
        for name, (layer, number, _) in self._places.items():
            if not self._rows(name):
                missed.setdefault(layer, set()).add(number)
        return [
            f"calibration never routed to {'expert' if len(numbers) == 1 else 'experts'} "
            f"{', '.join(map(str, sorted(numbers)))} of {layer}: rounded to nearest, their bits chosen as if they were "
            "the average expert and met half a time"
            for layer, numbers in missed.items()
        ]
