"""Running statistics of a small data set: input energies, output gradients and output ranges of every weight.

For a weight with input rows x_t and output gradients g_t (of the loss of one sample) the increase of the loss caused by
a change dW is, to second order and with the Fisher information for the Hessian,

    1/2 E[(sum_t g_t . dW x_t)^2]  ~  1/2 sum_ij F_ij dW_ij^2

Where a sample's rows have independent labels (the tokens of a language model), F factors: F_ij = G_i A_j with G =
E[g^2] over outputs and A = E[x^2] over inputs (the diagonal of K-FAC). Where all rows of a
sample share one loss (the patches of an image, the tokens of an embedded sentence) their gradients are correlated, so F
is accumulated as the squared gradient of each sample. An embedding's F is its rows' frequency times the gradient's
energy in each column.

Memory: the factored statistics take N + K numbers a weight, the others N x K; covariances of inputs, which rounding
with error feedback needs, K x K. What takes a matrix a weight is called large here, and may be collected for some of
the weights at a time: the first pass over the data collects all that is small, and the large statistics of those that
are `held`; further passes (`Collector.again`) those of others. What inputs cost at each level is measured in the first
pass, see `foveate.collect.inputs`; for that the inputs of one batch are kept from its forward to its backward, or made
again (`foveate.collect.replay`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from foveate.collect.inputs import InputStatistics
from foveate.collect.kinds import Found, Kind, kind_of, patches, weight_matrix, weight_matrix_shape
from foveate.collect.objectives import Objective, run
from foveate.collect.replay import Replay
from foveate.errors import DataError

#: Per-sample gradients are made this many numbers at a time.
_CHUNK = 1 << 24


@dataclass(frozen=True, eq=False)
class Factored:
    """A Fisher information F_ij = gradient_N[i] * energy_K[j] for one sample.

    Attributes:
        gradient_N: E[g^2] of each output, summed over a sample's rows.
        energy_K: E[x^2] of each input.
    """

    gradient_N: Tensor
    energy_K: Tensor


class WeightStatistics:
    """Running sums of one module's use of its weight.

    Attributes:
        energy_K: sum over rows of x^2, float64.
        gradient_N: sum over rows of g^2, float64 (factored).
        fisher_NK: sum over samples of the squared gradient, float32 (not factored), while held.
        covariance_KK: sum over rows of x x^T, float32 (not embeddings, nor convolutions of groups), while held.
        frequency_N, gradient_K: how often each row was read, and the energy of its gradient (embeddings).
        rows: rows of x seen.
        output_range: least and greatest output.
        inputs: what its input is like and what its levels cost; None for an embedding.
    """

    def __init__(self, shape: tuple[int, int], kind: Kind, factored: bool, covariance: bool) -> None:
        rows, columns = shape
        self.kind, self.factored = kind, factored
        self._large: dict[str, tuple[int, int]] = {}
        if kind is not Kind.EMBEDDING:
            if not factored:
                self._large["fisher_NK"] = shape
            if covariance:
                self._large["covariance_KK"] = (columns, columns)
        self.tensors: dict[str, Tensor] = {
            "rows": torch.zeros((), dtype=torch.float64),
            "output_range": torch.tensor([float("inf"), float("-inf")]),
        }
        self.inputs = None if kind is Kind.EMBEDDING else InputStatistics()
        if kind is Kind.EMBEDDING:
            self.tensors["frequency_N"] = torch.zeros(rows, dtype=torch.float64)
            self.tensors["gradient_K"] = torch.zeros(columns, dtype=torch.float64)
        else:
            self.tensors["energy_K"] = torch.zeros(columns, dtype=torch.float64)
            if factored:
                self.tensors["gradient_N"] = torch.zeros(rows, dtype=torch.float64)

    @property
    def large_bytes(self) -> int:
        """Bytes of what is collected only while it is held."""
        return sum(4 * a * b for a, b in self._large.values())

    @property
    def needs_gradients(self) -> bool:
        """Whether what is large is made of gradients."""
        return "fisher_NK" in self._large

    def hold(self) -> None:
        """Begin the large statistics."""
        self.tensors.update({key: torch.zeros(shape) for key, shape in self._large.items()})

    def release(self) -> None:
        """Give their memory back."""
        for key in self._large:
            self.tensors.pop(key, None)

    def see(self, module: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], None]:
        """Take the inputs and outputs of one call; returns what takes the output's gradient."""
        low, high = y.detach().aminmax()
        limits = self.tensors["output_range"]
        self.tensors["output_range"] = torch.stack(
            [torch.minimum(limits[0], low.float()), torch.maximum(limits[1], high.float())]
        )
        if self.kind is Kind.EMBEDDING:
            self.tensors["frequency_N"] += torch.bincount(x.reshape(-1), minlength=len(self.tensors["frequency_N"]))
            self.tensors["rows"] += x.numel()
            return self._see_embedding_gradient
        if self.kind is Kind.CONV:
            columns = patches(cast(nn.Conv2d, module), x.detach().float())
            self.tensors["energy_K"] += columns.square().sum((0, 1, 3))
            self.tensors["rows"] += columns.shape[0] * columns.shape[1] * columns.shape[3]
            self._see_covariance(columns.permute(0, 1, 3, 2))
            return self._see_conv_inputs(cast(nn.Conv2d, module), x.detach(), columns)
        # a copy, for it is needed in backward: nothing keeps a model from changing x in place meanwhile
        x_float = x.detach().to(torch.float32, copy=True)
        x_BTK = x_float.reshape(len(x) if x.dim() > 1 else 1, -1, x.shape[-1])
        self.tensors["energy_K"] += x_BTK.square().sum((0, 1))
        self.tensors["rows"] += x_BTK.shape[0] * x_BTK.shape[1]
        self._see_covariance(x_BTK)
        inputs = cast(InputStatistics, self.inputs)
        inputs.see(x_BTK, x_BTK)

        def after(g: Tensor) -> None:
            g_BTN = g.float().reshape(*x_BTK.shape[:2], -1)
            inputs.score(x_BTK, g_BTN, weight_matrix(module), self.factored)
            if self.factored:
                self._see_gradient(g)
            else:
                self._see_sample_gradients(x_BTK.transpose(1, 2), g_BTN.transpose(1, 2))

        return after

    def see_again(self, module: nn.Module, x: Tensor) -> Callable[[Tensor], None] | None:
        """The large statistics alone, of a call that `see` has taken before; returns what takes the gradient, if any
        is needed.
        """
        if self.kind is Kind.CONV:
            columns_BgKP = patches(cast(nn.Conv2d, module), x.detach().float())
            self._see_covariance(columns_BgKP.permute(0, 1, 3, 2))
            return lambda g: self._see_conv_gradient(columns_BgKP, g)
        x_float = x.detach().to(torch.float32, copy=self.needs_gradients)
        x_BTK = x_float.reshape(len(x) if x.dim() > 1 else 1, -1, x.shape[-1])
        self._see_covariance(x_BTK)
        if self.factored:
            return None
        return lambda g: self._see_sample_gradients(
            x_BTK.transpose(1, 2), g.float().reshape(*x_BTK.shape[:2], -1).transpose(1, 2)
        )

    def _see_conv_inputs(self, conv: nn.Conv2d, x: Tensor, columns_BgKP: Tensor) -> Callable[[Tensor], None]:
        inputs = cast(InputStatistics, self.inputs)
        x_BPK = columns_BgKP[:, 0].transpose(1, 2)
        inputs.see(x, columns_BgKP.transpose(2, 3))
        w_NK = weight_matrix(conv)

        def after(g: Tensor) -> None:
            self._see_conv_gradient(columns_BgKP, g)
            # a grouped convolution is computed from its inputs as they are
            if conv.groups == 1:
                inputs.score(x_BPK, g.float().reshape(len(x_BPK), -1, x_BPK.shape[1]).transpose(1, 2), w_NK, False)

        return after

    def _see_covariance(self, x: Tensor) -> None:
        if "covariance_KK" in self.tensors:
            rows = x.reshape(-1, x.shape[-1])
            self.tensors["covariance_KK"].addmm_(rows.t(), rows)

    def _see_gradient(self, g: Tensor) -> None:
        self.tensors["gradient_N"] += g.float().reshape(-1, g.shape[-1]).square().sum(0)

    def _see_embedding_gradient(self, g: Tensor) -> None:
        self.tensors["gradient_K"] += g.float().reshape(-1, g.shape[-1]).square().sum(0)

    def _see_conv_gradient(self, columns_BgKP: Tensor, g: Tensor) -> None:
        batch, groups, _, positions = columns_BgKP.shape
        g_BgNP = g.float().reshape(batch, groups, -1, positions)
        rows = g_BgNP.shape[2]
        for i in range(groups):
            self._see_sample_gradients(columns_BgKP[:, i], g_BgNP[:, i], slice(i * rows, (i + 1) * rows))

    def _see_sample_gradients(self, x_BKT: Tensor, g_BNT: Tensor, rows: slice = slice(None)) -> None:
        if "fisher_NK" not in self.tensors:
            return
        fisher = self.tensors["fisher_NK"][rows]
        step = max(1, _CHUNK // fisher.numel())
        for at in range(0, len(x_BKT), step):
            gradients = torch.bmm(g_BNT[at : at + step], x_BKT[at : at + step].transpose(1, 2))
            fisher += gradients.square_().sum(0)

    def input_energy(self) -> Tensor | None:
        """A: the mean of x^2 for each input, float32 [K]; None for an embedding."""
        if self.kind is Kind.EMBEDDING:
            return None
        return (self.tensors["energy_K"] / self.tensors["rows"].clamp_min(1)).float()

    def covariance(self) -> Tensor | None:
        """E[x x^T], float32 [K, K]; None where it is not held or nothing was seen."""
        total = self.tensors.get("covariance_KK")
        rows = float(self.tensors["rows"])
        return total / rows if total is not None and rows else None

    def fisher(self, samples: int) -> Tensor | Factored:
        """F for one sample: [N, K], or its factors."""
        t = self.tensors
        seen = t["rows"].clamp_min(1)
        if self.kind is Kind.EMBEDDING:
            # half a count more for each row, so that a token that calibration never met is not worth nothing
            frequency = (t["frequency_N"] + 0.5) * t["rows"] / (t["rows"] + 0.5 * len(t["frequency_N"]))
            return Factored((frequency / samples).float(), (t["gradient_K"] / seen).float())
        if self.factored:
            return Factored((t["gradient_N"] / samples).float(), (t["energy_K"] / seen).float())
        return t["fisher_NK"] / samples


#: Takes one call: the module's name, the module, its input and output; returns what takes the output's gradient.
Take = Callable[[str, nn.Module, Tensor, Tensor], Callable[[Tensor], None] | None]


def statistics_of(module: nn.Module, objective: Objective) -> WeightStatistics:
    """What is to be collected of a module, nothing large held yet."""
    kind = kind_of(module)
    assert kind is not None, type(module).__name__
    factored = kind is Kind.EMBEDDING or (objective.independent_rows and kind is not Kind.CONV)
    return WeightStatistics(weight_matrix_shape(module), kind, factored, getattr(module, "groups", 1) == 1)


class _Reached(BaseException):
    """The last call that a pass was for has been seen. No error, and nothing a model should catch."""


class Collector:
    """Statistics of every weight of a model, batch by batch; its state can be saved and continued.

    Attributes:
        by_module: statistics for each module's name.
        samples, batches: how much was seen.
        calls: for each batch seen, the modules in the order in which they were called, by number; none for batches
            that were seen before the state was restored.
    """

    def __init__(
        self,
        found: Iterable[Found],
        objective: Objective,
        *,
        held: Collection[str] | None = None,
        replay: Replay | None = None,
        seed: int = 0,
    ) -> None:
        """
        Args:
            found: the weights.
            objective: what the outputs are for.
            held: names of the modules whose large statistics the first pass collects; all if not given.
            replay: what runs parts of the model twice to save memory, if anything does.
            seed: of the directions.
        """
        self.objective = objective
        self.samples = 0
        self.batches = 0
        self.calls: list[list[int]] = []
        self._seed = seed
        self._replay = replay or Replay(())
        self._modules = {name: module for f in found for name, module in zip(f.names, f.modules, strict=True)}
        self._numbers = {name: number for number, name in enumerate(self._modules)}
        self.by_module: dict[str, WeightStatistics] = {}
        for name, module in self._modules.items():
            self.by_module[name] = statistics_of(module, objective)
            if held is None or name in held:
                self.by_module[name].hold()

    def add(self, model: nn.Module, batch: Any) -> None:
        """One forward and one backward pass. Raises `DataError` if the loss is not finite."""
        self.calls.append([])
        with torch.enable_grad(), self._hooks(self._take, True), self._replay.running():
            loss, samples = self._loss(model, batch, self.batches)
            if samples == 0:
                raise DataError(f"batch {self.batches} holds no samples")
            if not bool(torch.isfinite(loss)):
                raise DataError(
                    f"batch {self.batches} gives a loss that is not finite ({float(loss.detach())}): "
                    "NaN or Inf in the data, or in the model"
                )
            if not loss.requires_grad:
                raise DataError("the model's output does not depend on any weight that can be quantized")
            loss.backward()
        self.samples += samples
        self.batches += 1

    def _loss(self, model: nn.Module, batch: Any, index: int) -> tuple[Tensor, int]:
        return self.objective.loss(run(model, batch), batch, torch.Generator().manual_seed(self._seed + index))

    def again(self, model: nn.Module, batch: Any, index: int, names: Collection[str]) -> None:
        """The large statistics of some modules, from a batch that `add` has taken before.

        Where no gradients are needed the model runs only as far as the last call of these modules.

        Args:
            model: as for `add`.
            batch: the batch of this index.
            index: the first is 0.
            names: the modules; their statistics are held.
        """
        backward = any(self.by_module[name].needs_gradients for name in names)
        left = -1 if backward else self.last_call(index, names)
        if left == 0:
            return

        def take(name: str, module: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], None] | None:
            nonlocal left
            seen = None
            if name in names and not self._replay.ahead:
                seen = self.by_module[name].see_again(module, x)
            left -= not self._replay.again
            if left == 0:
                raise _Reached
            return seen

        with torch.set_grad_enabled(backward), self._hooks(take, backward):
            if not backward:
                with suppress(_Reached):
                    run(model, batch)
                return
            with self._replay.running():
                loss, _ = self._loss(model, batch, index)
                loss.backward()

    def last_call(self, index: int, names: Collection[str]) -> int:
        """How many calls of a batch it takes until all of some modules' have been made; -1 if that is not known."""
        place = index - (self.batches - len(self.calls))
        if place < 0:
            return -1
        wanted = {self._numbers[name] for name in names}
        return max((i + 1 for i, number in enumerate(self.calls[place]) if number in wanted), default=0)

    def first_call(self, index: int, names: Collection[str]) -> int:
        """How many calls of a batch are made before the first one of some modules; 0 if that is not known."""
        place = index - (self.batches - len(self.calls))
        if place < 0:
            return 0
        wanted = {self._numbers[name] for name in names}
        calls = self.calls[place]
        return next((i for i, number in enumerate(calls) if number in wanted), len(calls))

    def _take(self, name: str, module: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], None] | None:
        if not self._replay.again:
            self.calls[-1].append(self._numbers[name])
        return None if self._replay.ahead else self.by_module[name].see(module, x, y)

    @contextmanager
    def _hooks(self, take: Take, backward: bool) -> Iterator[None]:
        spark = torch.zeros((), requires_grad=True)

        def hook(name: str) -> Callable[..., Tensor]:
            def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
                wanted = backward and not self._replay.ahead
                # parameters are frozen meanwhile, so the first outputs must be given a gradient
                if wanted and not output.requires_grad:
                    output = output + spark
                if wanted and not output.requires_grad:
                    raise DataError(f"{name} runs without gradients (torch.no_grad in the model): name it in skip")
                if not output.numel():  # an empty batch, or a layer that no row came by
                    return output
                x = args[0] if args else kwargs["input"]
                seen = take(name, module, x, output)
                if wanted and seen is not None:
                    output.register_hook(seen)
                return output

            return after

        handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in self._modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def unseen(self) -> list[str]:
        """Modules that no batch ever reached."""
        return [name for name, s in self.by_module.items() if float(s.tensors["rows"]) == 0]

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on later."""
        counts = {"samples": self.samples, "batches": self.batches}
        flat = {f"{name}|{key}": t for name, s in self.by_module.items() for key, t in s.tensors.items()}
        for name, s in self.by_module.items():
            if s.inputs is not None:
                flat.update({f"{name}|input {key}": t for key, t in s.inputs.tensors.items()})
        return {**{k: torch.tensor(v, dtype=torch.float64) for k, v in counts.items()}, **flat}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state()`; raises `DataError` if it is of another model or objective."""
        expected = {k: t.shape for k, t in self.state().items()}
        if {k: t.shape for k, t in state.items()} != expected:
            raise DataError("the resume file was made for another model or objective: delete it to start afresh")
        self.samples, self.batches = int(state["samples"]), int(state["batches"])
        for name, s in self.by_module.items():
            s.tensors = {key: state[f"{name}|{key}"].clone() for key in s.tensors}
            if s.inputs is not None:
                s.inputs.tensors = {key: state[f"{name}|input {key}"].clone() for key in s.inputs.tensors}
