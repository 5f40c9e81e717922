"""The hooks that feed the statistics of every weight, batch by batch.

The first pass over the data (`Collector.add`, forward and backward) collects all small statistics, and the large
statistics of the weights that are `held`. Further passes (`Collector.add_large`) collect the large statistics of other
weights. Where these need no gradients, such a pass runs forward only, and no further than the last of its weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from foveate.collect.input_rows import InputRows
from foveate.collect.kinds import Kind, QuantizableWeight
from foveate.collect.objectives import Objective, run
from foveate.collect.replay import Replay
from foveate.collect.statistics import WeightStatistics, statistics_of
from foveate.collect.sums import clear
from foveate.errors import DataError

#: Takes one call: the module's name, the module, its input and output; returns what takes the output's gradient.
Take = Callable[[str, nn.Module, Tensor, Tensor], Callable[[Tensor], None] | None]

#: How the statistics of inputs are named among the others.
_OF_INPUTS = "input "


class _LastCallReached(BaseException):
    """Stops a pass after the last call that it is for. This is no error, and a model should not catch it."""


class Collector:
    """Statistics of every weight of a model, batch by batch; its state can be saved and continued.

    Attributes:
        by_module: statistics for each module's name.
        samples, batches: how many were seen.
        seconds: the time that statistics took, beside the model itself.
        calls: for each batch, by its place in the data, the modules, by number, in the order of their calls. Batches
            that were seen before the state was restored, or by other processes, have no entry.
    """

    def __init__(
        self,
        found: Iterable[QuantizableWeight],
        objective: Objective,
        *,
        held: Collection[str] | None = None,
        replay: Replay | None = None,
        shards: int = 1,
    ) -> None:
        """
        Args:
            found: the weights.
            objective: what the outputs are for.
            held: names of the modules whose large statistics the first pass collects; all if not given.
            replay: the blocks that run twice to save memory; none if not given.
            shards: into how many parts the data are cut, each of which is collected from the beginning.
        """
        self.objective = objective
        self.samples = 0
        self.batches = 0
        self.seconds = 0.0
        self.calls: dict[int, list[int]] = {}
        self._calls: list[int] = []  # those of the batch that runs
        self._replay = replay or Replay(())
        self._input: InputRows | None = None  # the last one, which the next layer may read too
        self._modules = {name: module for f in found for name, module in zip(f.names, f.modules, strict=True)}
        self._numbers = {name: number for number, name in enumerate(self._modules)}
        self.by_module: dict[str, WeightStatistics] = {}
        for name, module in self._modules.items():
            self.by_module[name] = statistics_of(module, objective, shards)
            if held is None or name in held:
                self.by_module[name].hold()

    def add(
        self, model: nn.Module, batch: Any, index: int | None = None, show: Callable[[Any], None] | None = None
    ) -> None:
        """Make one forward and one backward pass.

        Args:
            model: in evaluation mode, its parameters frozen.
            batch: the batch.
            index: the place of the batch in the data, from 0; behind all batches that were seen if not given.
            show: gets the output.

        Raises:
            DataError: the batch is empty, its loss is not finite, or no gradient reaches a weight.
        """
        index = self.batches if index is None else index
        self._calls = self.calls[index] = []
        with torch.enable_grad(), self._hooks(self._take, True), self._replay.running():
            output = run(model, batch)
            loss, samples = self._loss(output, batch, index)
            if samples == 0:
                raise DataError(f"batch {index} holds no samples")
            if not bool(torch.isfinite(loss)):
                raise DataError(
                    f"batch {index} gives a loss that is not finite ({float(loss.detach())}): "
                    "NaN or Inf in the data, or in the model"
                )
            if not loss.requires_grad:
                raise DataError("the model's output does not depend on any weight that can be quantized")
            if show is not None:
                show(output)
            del output
            loss.backward()
        self.samples += samples
        self.batches += 1

    def _loss(self, output: Any, batch: Any, index: int) -> tuple[Tensor, int]:
        return self.objective.loss(output, batch, torch.Generator().manual_seed(index))

    def add_large(self, model: nn.Module, batch: Any, index: int, names: Collection[str]) -> None:
        """Collect the large statistics of some modules from a batch that `add` has seen before.

        Where no gradients are needed the model runs only as far as the last call of these modules.

        Args:
            model: as for `add`.
            batch: the batch.
            index: the place of the batch in the data, from 0.
            names: the modules; their statistics are held.
        """
        backward = any(self.by_module[name].needs_gradients for name in names)
        left = -1 if backward else self.last_call(index, names)
        if left == 0:
            return

        def take(name: str, module: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], None] | None:
            nonlocal left
            seen = None
            if name in names and not self._replay.first_run:
                seen = self.by_module[name].see_large(module, x, self._rows_of(name, x))
            left -= not self._replay.second_run
            if left == 0:
                raise _LastCallReached
            return seen

        with torch.set_grad_enabled(backward), self._hooks(take, backward):
            if not backward:
                with suppress(_LastCallReached):
                    run(model, batch)
                return
            with self._replay.running():
                loss, _ = self._loss(run(model, batch), batch, index)
                loss.backward()

    def last_call(self, index: int, names: Collection[str]) -> int:
        """How many calls of a batch it takes until all calls of these modules are made; -1 if that is not known."""
        calls = self.calls.get(index)
        if calls is None:
            return -1
        wanted = {self._numbers[name] for name in names}
        return max((i + 1 for i, number in enumerate(calls) if number in wanted), default=0)

    def first_call(self, index: int, names: Collection[str]) -> int:
        """How many calls of a batch are made before the first call of these modules; 0 if that is not known."""
        calls = self.calls.get(index)
        if calls is None:
            return 0
        wanted = {self._numbers[name] for name in names}
        return next((i for i, number in enumerate(calls) if number in wanted), len(calls))

    def _take(self, name: str, module: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], None] | None:
        if not self._replay.second_run:
            self._calls.append(self._numbers[name])
        return None if self._replay.first_run else self.by_module[name].see(module, x, y, self._rows_of(name, x))

    def _rows_of(self, name: str, x: Tensor) -> InputRows | None:
        """The rows of a linear layer's input; those of the layer before if it was the same input."""
        if self.by_module[name].kind not in (Kind.LINEAR, Kind.LINEAR_TRANSPOSED):
            return None
        if self._input is None or not self._input.are_of(x):
            self._input = InputRows(x)
        return self._input

    @contextmanager
    def _hooks(self, take: Take, backward: bool) -> Iterator[None]:
        zero = torch.zeros((), requires_grad=True)

        def hook(name: str) -> Callable[..., Tensor]:
            def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
                wanted = backward and not self._replay.first_run
                # parameters are frozen, so the first outputs must be made to ask for a gradient
                if wanted and not output.requires_grad:
                    output = output + zero
                if wanted and not output.requires_grad:
                    raise DataError(f"{name} runs without gradients (torch.no_grad in the model): name it in skip")
                if not output.numel():  # an empty batch, or an expert that no row was routed to
                    return output
                x = args[0] if args else kwargs["input"]
                started = time.perf_counter()
                seen = take(name, module, x, output)
                self.seconds += time.perf_counter() - started
                if wanted and seen is not None:
                    output.register_hook(self._timed(seen))
                return output

            return after

        handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in self._modules.items()]
        try:
            yield
        finally:
            self._input = None
            for handle in handles:
                handle.remove()

    def _timed(self, take: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def timed(gradient: Tensor) -> None:
            started = time.perf_counter()
            take(gradient)
            self.seconds += time.perf_counter() - started

        return timed

    def unseen(self) -> list[str]:
        """Names of the modules that no batch reached."""
        return [name for name, s in self.by_module.items() if float(s.tensors["rows"]) == 0]

    def state(self) -> dict[str, Tensor]:
        """All statistics so far, as `restore` takes them."""
        counts = {"samples": self.samples, "batches": self.batches}
        flat = {f"{name}|{key}": t for name, s in self.by_module.items() for key, t in s.tensors.items()}
        for name, s in self.by_module.items():
            if s.inputs is not None:
                flat.update({f"{name}|{_OF_INPUTS}{key}": t for key, t in s.inputs.tensors.items()})
        return {**{k: torch.tensor(v, dtype=torch.float64) for k, v in counts.items()}, **flat}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state()`.

        Raises:
            DataError: the state is of another model or objective.
        """
        expected = {k: (t.shape, t.dtype) for k, t in self.state().items()}
        if {k: (t.shape, t.dtype) for k, t in state.items()} != expected:
            raise DataError("the resume file was made for another model or objective: delete it to start afresh")
        for key, tensor in state.items():
            self.put(key, tensor.clone())

    def put(self, key: str, tensor: Tensor) -> None:
        """Put a tensor in the place of the one that `state` has at a key."""
        name, _, statistic = key.rpartition("|")
        if key in ("samples", "batches"):
            setattr(self, key, int(tensor))
        elif (inputs := self.by_module[name].inputs) is not None and statistic.startswith(_OF_INPUTS):
            inputs.tensors[statistic.removeprefix(_OF_INPUTS)] = tensor
        else:
            self.by_module[name].tensors[statistic] = tensor

    def clear(self, keys: Iterable[str]) -> None:
        """Set the statistics at some keys of `state` to what they are before any data."""
        state = self.state()
        for key in keys:
            clear(key, state[key])
            if key in ("samples", "batches"):
                self.put(key, state[key])
