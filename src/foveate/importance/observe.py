"""What one pass of a live model shows of its weights' inputs: sums of squares by group, and how often experts are met.

Hooks are on the modules only while a pass is observed. Other passes pay for one hook of the whole model. Of a long
input some rows are taken, evenly spaced, and stand for all. Layers that share an input are observed once. Convolutions
are not observed; their importance stays that of calibration.

The cost of an observed pass is some tens of microseconds for each layer (`foveate bench importance` measures it).

Shapes: M rows, K columns, G groups, NT strips of 16 rows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from foveate.formats.packing import TILE_ROWS
from foveate.importance.rolling import Seen
from foveate.nn.experts import PlaneExperts
from foveate.nn.modules import PlaneEmbedding, PlaneLinear
from foveate.nn.registry import Registry

#: At most this many rows of an input are read.
_MOST_ROWS = 256


class Observer:
    """Observes passes of one model, one at a time and in one thread.

    Args:
        model: the quantized module.
        registry: its registry.
        followed: the weights to observe.
    """

    def __init__(self, model: nn.Module, registry: Registry, followed: frozenset[str]) -> None:
        names = {id(weight): name for name, weight in registry.weights.items() if name in followed}
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, PlaneEmbedding)}
        linears = {id(m.weight) for m in model.modules() if isinstance(m, PlaneLinear)}
        self._linears: list[tuple[PlaneLinear, str]] = []
        self._embeddings: list[tuple[PlaneEmbedding, str]] = []
        self._experts: list[tuple[PlaneExperts, frozenset[str]]] = []
        for module in model.modules():
            if isinstance(module, PlaneLinear) and id(module.weight) in names:
                self._linears.append((module, names[id(module.weight)]))
            elif isinstance(module, PlaneEmbedding) and id(module.weight) in names:
                # a tied weight is followed by its products, whose energies calibration kept
                if id(module.weight) in embeddings - linears:
                    self._embeddings.append((module, names[id(module.weight)]))
            elif isinstance(module, PlaneExperts):
                own = {names.get(id(m.weight)) for m in module.modules() if isinstance(m, PlaneLinear)} - {None}
                self._experts.append((module, frozenset(name for name in own if name is not None)))
        self._handles: list[RemovableHandle] = []
        self._thread = 0
        self._shared: tuple[Tensor, int, Tensor] | None = None
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._rows: dict[str, float] = {}
        self._tokens: dict[str, float] = {}
        self._shared = None

    def begin(self) -> None:
        """Observe what this thread computes from now on."""
        self._clear()
        self._thread = threading.get_ident()
        for linear, name in self._linears:
            self._handles.append(linear.register_forward_pre_hook(self._linear_hook(name, linear), with_kwargs=True))
        for embedding, name in self._embeddings:
            self._handles.append(
                embedding.register_forward_pre_hook(self._embedding_hook(name, embedding), with_kwargs=True)
            )
        for layer, names in self._experts:
            self._handles.append(layer.register_forward_pre_hook(self._experts_hook(layer, names), with_kwargs=True))

    def end(self) -> Mapping[str, Seen]:
        """Stop, and return what was seen of each weight. An expert that was not met was seen with sums of 0."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        found = {}
        for name, tokens in self._tokens.items():
            if name not in self._sums:
                weight = next(module.weight.value for module, own in self._linears if own == name)
                self._sums[name] = torch.zeros(1, weight.grid[1], dtype=torch.float64)
            found[name] = Seen(sums=self._sums[name], tokens=tokens)
        for name, sums in self._sums.items():
            if name not in found:
                found[name] = Seen(sums=sums, tokens=self._rows[name])
        self._clear()
        return found

    def _linear_hook(self, name: str, module: PlaneLinear) -> Callable[..., None]:
        group = module.weight.value.group

        def observe(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._is_mine():
                x = args[0] if args else kwargs["input"]
                self._add(name, self._energies(x, group), x.numel() // max(x.shape[-1], 1))

        return observe

    def _embedding_hook(self, name: str, module: PlaneEmbedding) -> Callable[..., None]:
        strips = module.weight.value.grid[0]

        def observe(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._is_mine():
                ids = (args[0] if args else kwargs["input"]).detach().reshape(-1)
                counts = torch.bincount(ids // TILE_ROWS, minlength=strips)
                self._add(name, counts.double()[:, None], len(ids))

        return observe

    def _experts_hook(self, layer: PlaneExperts, names: frozenset[str]) -> Callable[..., None]:
        def observe(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._is_mine():
                x = args[0] if args else kwargs["hidden_states"]
                tokens = x.numel() // max(x.shape[-1], 1)
                if len(args) < 2 and "top_k_index" not in kwargs:  # every expert is given its rows
                    tokens //= layer.num_experts
                for name in names:
                    self._tokens[name] = self._tokens.get(name, 0.0) + tokens

        return observe

    def _is_mine(self) -> bool:
        return self._thread == threading.get_ident() and not torch.compiler.is_compiling()

    def _add(self, name: str, sums: Tensor, rows: int) -> None:
        before = self._sums.get(name)
        self._sums[name] = sums if before is None else before + sums
        self._rows[name] = self._rows.get(name, 0.0) + rows

    def _energies(self, x: Tensor, group: int) -> Tensor:
        """The sum over rows of the mean square of each group, float64 [1, G]."""
        if self._shared is not None and self._shared[0] is x and self._shared[1] == group:
            return self._shared[2]
        x_MK = x.detach().reshape(-1, x.shape[-1])
        count = len(x_MK)
        some_MK = x_MK[:: -(-count // _MOST_ROWS)] if count > _MOST_ROWS else x_MK
        squares_K = some_MK.float().square().sum(0)
        grouped = F.pad(squares_K, (0, -len(squares_K) % group)).view(1, -1, group).mean(2).double()
        energies = grouped * (count / max(len(some_MK), 1))
        self._shared = (x, group, energies)
        return energies


class Hook:
    """Two functions that are called before and after each eager pass of a model, until `end`.

    A copy of the model has a hook that does nothing.
    """

    def __init__(
        self,
        begin: Callable[[tuple[Any, ...], dict[str, Any]], None] | None,
        done: Callable[[bool], None] | None,
    ) -> None:
        self._begin, self._done = begin, done

    def __reduce__(self) -> Any:
        return Hook, (None, None)

    def end(self) -> None:
        """Call nothing any more."""
        self._begin = self._done = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook with keywords."""
        if self._begin is not None and not torch.compiler.is_compiling():
            self._begin(args, kwargs)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward hook that runs even if the call raised."""
        if self._done is not None and not torch.compiler.is_compiling():
            self._done(output is not None)


class Pace:
    """Keeps the time of observed passes to a share of the time of all passes, by a credit that other passes earn.

    An observed pass may take many times as long as others: hooks have a decoder's blocks computed one by one.

    Args:
        most: the share, 0 to 1; None for no limit.
    """

    def __init__(self, most: float | None) -> None:
        self._most, self._credit = most, 0.0
        self._began: dict[int, float] = {}

    @property
    def allows(self) -> bool:
        """Whether a pass may be observed now."""
        return self._most is None or self._credit >= 0

    def begin(self) -> None:
        """A pass of this thread begins."""
        self._began[threading.get_ident()] = time.perf_counter()

    def end(self, was_observed: bool) -> None:
        """It has ended."""
        began = self._began.pop(threading.get_ident(), None)
        if began is not None and self._most is not None:
            taken = time.perf_counter() - began
            self._credit = min(self._credit + self._most * taken - taken * was_observed, taken)
