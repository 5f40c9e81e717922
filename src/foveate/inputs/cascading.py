"""cascade: a classifier that reads each sample at few bits first, and again at more where its margin is thin.

This is the whole map before the main computation, as patent 10983754 has it: a cheap pass over the input decides at
which precision the input is read. `foveate.adapt_to_input` decides weight by weight instead, within one pass.

Legend: B samples of a batch, C classes, m maps, n samples in all.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.allocate import frontier
from foveate.collect.evaluation import evaluating
from foveate.collect.objectives import Logits, check_batches, run
from foveate.errors import BudgetError, DataError, FoveateError
from foveate.inputs.adapt import nearest
from foveate.inputs.margins import cascade_plan, margins, static_plan
from foveate.nn.closing import Closing
from foveate.nn.levels import apply, class_numbers, highest_map, set_classes, withdraw
from foveate.nn.registry import profile_of, registry_of
from foveate.precision.frontiers import Frontier
from foveate.precision.state import Request
from foveate.progress import say, track

#: Maps of a frontier that is made here, and those of a frontier that are tried.
_POINTS, _TRIED = 160, 12
#: An agreement is known badly where the samples may disagree less often than this.
_FEW_ERRORS = 10
_NUMBERS = itertools.count(1)
_OBJECTIVE = Logits()


@dataclass(frozen=True, kw_only=True)
class CascadeVerdict:
    """What a cascade gave on samples that it was not set on.

    Attributes:
        agreement: the part that is decided as by the reference.
        bits: bits of a weight that a sample read on average, both readings counted.
        static_agreement, static_bits: the same of the cheapest single map that was found with the same rule.
        share: the part that was read again.
        samples: how many samples there were.
        asked: the agreement that was asked for.
    """

    agreement: float
    bits: float
    static_agreement: float
    static_bits: float
    share: float
    samples: int
    asked: float

    @property
    def ratio(self) -> float:
        """Bits of the cascade over those of the single map."""
        return self.bits / self.static_bits

    @property
    def pays(self) -> bool:
        """Whether the cascade reads less than the single map, and keeps what was asked for as far as chance lets it."""
        return self.ratio < 1 and not self.broken

    @property
    def broken(self) -> bool:
        """Whether the agreement is below what was asked for, by more than two standard errors."""
        return self.agreement < self.asked - 2 * math.sqrt(self.asked * (1 - self.asked) / max(self.samples, 1))

    def __str__(self) -> str:
        said = "the cascade pays" if self.pays else "no gain was found: a single map reads less"
        if self.broken:
            said = f"the agreement of {self.asked:g} is not kept: give more data, or data that are more like these"
        return (
            f"{said}: agreement {self.agreement:.4f} at {self.bits:.3f} bits, {self.share:.1%} read twice; single map "
            f"{self.static_agreement:.4f} at {self.static_bits:.3f} bits, ratio {self.ratio:.3f} ({self.samples})"
        )


class Cascade(Closing):
    """A classifier that reads samples twice where that is needed; made by `cascade`. Call it as the model is called; it
    gives the logits alone, whatever else the model's output holds.

    Attributes:
        frontier: the maps that the two are of.
        low, high: the indices of the two maps.
        threshold: the margin below which a sample is read again.
        verdict: what was measured on held-out samples; None if that was not asked for.
    """

    def __init__(self, model: nn.Module, chain: Frontier, low: int, high: int, threshold: float) -> None:
        self.frontier, self.low, self.high, self.threshold = chain, low, high, threshold
        self.verdict: CascadeVerdict | None = None
        self._model, self._registry = model, registry_of(model)
        self._decider = f"cascade {next(_NUMBERS)}"
        self._lock = threading.Lock()
        self._samples = self._again = 0
        self._bits_read = 0.0
        self._closed = False
        self._requests = (Request(tier=low), Request(tier=high))
        apply(model, chain, decider=self._decider)  # of its own, also where another decider has the same in force
        set_classes(model, self._requests, decider=self._decider)

    def __call__(self, *args: Any, **named: Any) -> Tensor:
        """The logits of a batch, [B, C]; arguments are the model's.

        Raises:
            FoveateError: it was closed, or another frontier is in force than the one that it was set on.
            DataError: no argument is a tensor, or the output has no logits of classes.
        """
        if self._closed:
            raise FoveateError("this cascade was closed: make another one")
        state = self._registry.generations.state
        if state is None or state.frontier is not self.frontier:
            raise FoveateError(
                "the frontier that this cascade was set on is not in force any more: make another cascade"
            )
        count = _count(args, named)
        logits_BC = self._read(0, count, args, named)
        thin_B = margins(logits_BC) < self.threshold
        again = int(thin_B.sum())
        if again:
            index = thin_B.nonzero()[:, 0]
            part = self._read(1, again, *_selected(args, named, index, count))
            logits_BC = logits_BC.index_copy(0, index, part.to(logits_BC.dtype))
        with self._lock:
            self._samples += count
            self._again += again
            self._bits_read += count * self._bits_of(0) + again * self._bits_of(1)
        return logits_BC

    def _bits_of(self, which: int) -> float:
        """Bits of the map that one of the two readings reads: a standing floor may have raised it."""
        composed = self._registry.generations.composed
        assert composed is not None
        return composed.maps[composed.pairs[self._class(which)][1]].bits

    def _class(self, which: int) -> int:
        """The number that the class of a reading has now: it changes when others come and go."""
        return class_numbers(self._model, self._requests, decider=self._decider)[self._requests[which]]

    def _read(self, which: int, count: int, args: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
        passes = self._registry.generations.passes
        before = passes.set_rows(lambda: [self._class(which)] * count)
        try:
            output = self._model(*args, **named)
        finally:
            passes.set_rows(before)
        logits = _OBJECTIVE.outcome(output, None)
        if logits.shape[0] != count:
            raise DataError(f"the output has {logits.shape[0]} rows of logits for {count} samples: not a classifier")
        return logits

    @property
    def share(self) -> float:
        """The part of the samples so far that were read again; NaN before the first."""
        return self._again / self._samples if self._samples else float("nan")

    @property
    def bits(self) -> float:
        """Bits of a weight that a sample read on average so far, both readings counted; NaN before the first."""
        return self._bits_read / self._samples if self._samples else float("nan")

    def close(self) -> None:
        """End it: the model is read as it would be without it."""
        self._closed = True
        set_classes(self._model, (), decider=self._decider)
        withdraw(self._model, self._decider)

    def __str__(self) -> str:
        said = "" if self.verdict is None else f"; {self.verdict}"
        return (
            f"{self.frontier.bits(self.low):.3f} bits first, and {self.frontier.bits(self.high):.3f} where the margin "
            f"is below {self.threshold:.3g}{said}"
        )


def cascade(
    model: nn.Module,
    *,
    batches: Iterable[Any],
    agreement: float = 0.99,
    reference: nn.Module | None = None,
    verdict: bool = True,
    progress: bool = True,
) -> Cascade:
    """Read each sample of a classifier at few bits first, and again at more bits where its margin is thin.

    The two maps and the threshold are those of the fewest bits at which enough samples of `batches` are decided as the
    reference decides them, both readings counted. Give data that the model was not trained on, or augmented data:
    models know their training data by heart, and thresholds from them are too low.

        with fv.cascade(model, batches=batches, agreement=0.99) as classify:
            print(classify.verdict)
            logits = classify(images)
            print(classify.bits, classify.share)

    Args:
        model: a quantized classifier with its profile: its output has logits [B, C].
        batches: data like those that the model will see, as for `foveate.quantize`. Every fourth is held out for the
            verdict; of fewer than four batches none is.
        agreement: the part of further samples to be decided as by the reference, 0 to 1. What `batches` must show is
            one standard error more.
        reference: the original model; by default the model itself with every plane that it holds.
        verdict: whether to measure if a cascade pays. If it does not, a line says so, and `verdict.pays` is False.
        progress: whether to show progress bars.

    Returns:
        The cascade, which is called as the model is, and is a context manager. `close()` ends it.

    Raises:
        BudgetError: no two maps show this agreement, or the output is not of classes.
        DataError: there are no batches.
        FoveateError: the model is not quantized, or has no profile.

    Source: patent 10983754; cascades by margin: Park et al., Big/little deep neural network, CODES+ISSS 2015.
    """
    given = list(check_batches(batches))
    if not given:
        raise DataError("there are no batches to set the threshold on: give at least one")
    if not 0 < agreement <= 1:
        raise BudgetError(f"agreement (={agreement!r}) is not a part of the samples, above 0 and at most 1")
    state = registry_of(model).generations.state
    in_force = None if state is None or len(state.frontier) < 2 else state.frontier
    chain = in_force or frontier(profile_of(model), _POINTS)
    indices = _tried(chain)
    held = given[3::4] if verdict and len(given) > 3 else []
    seen = [batch for i, batch in enumerate(given) if not held or i % 4 != 3]
    right_mn, margins_mn = _measured(model, chain, indices, seen, reference, progress)
    bits = [chain.bits(i) for i in indices]
    if right_mn.shape[1] * (1 - agreement) < _FEW_ERRORS:
        say(
            f"cascade: {right_mn.shape[1]} samples are few for an agreement of {agreement:g}, which they may show by "
            "chance: give more"
        )
    found = cascade_plan(right_mn, margins_mn, bits, agreement)
    if found is None:
        shown = float(right_mn.double().mean(1).max())
        raise BudgetError(
            f"agreement (={agreement:g}) is more than any map shows on these {right_mn.shape[1]} samples ({shown:.4f} "
            "at best): ask for less, or give more samples"
        )
    made = Cascade(model, chain, indices[found.low], indices[found.high], found.threshold)
    try:
        if verdict:
            tried = static_plan(right_mn, bits, agreement)
            alone = 0 if tried is None else indices[tried.low]
            following = [i for i in indices if i > alone]
            if tried is not None and following:
                alone = _cheapest(model, chain, alone, following[0], seen, agreement, reference, progress)
            made.verdict = _verdict(model, made, alone, held or seen, agreement, reference, progress)
            if not made.verdict.pays:
                say(f"cascade: {made.verdict}")
    except BaseException:
        made.close()
        raise
    return made


def _cheapest(
    model: nn.Module,
    chain: Frontier,
    good: int,
    bad: int,
    batches: Sequence[Any],
    agreement: float,
    reference: nn.Module | None,
    progress: bool,
) -> int:
    """The furthest index between one that shows enough and one that does not, by halves, that shows enough too."""
    while bad - good > 1:
        middle = (good + bad) // 2
        right_1n, _ = _measured(model, chain, [middle], batches, reference, progress)
        good, bad = (good, middle) if static_plan(right_1n, [1.0], agreement) is None else (middle, bad)
    return good


def _tried(chain: Frontier) -> list[int]:
    """Indices of a frontier whose bits are spread evenly, the best first."""
    most, least = chain.bits(0), chain.bits(len(chain) - 1)
    goals = [most - (most - least) * i / (_TRIED - 1) for i in range(_TRIED)]
    return sorted({nearest(chain, goal) for goal in goals})


def _measured(
    model: nn.Module,
    chain: Frontier,
    indices: Sequence[int],
    batches: Sequence[Any],
    reference: nn.Module | None,
    progress: bool,
) -> tuple[Tensor, Tensor]:
    """(whether each map decides each sample as the reference does, bool [m, n]; margins, float32 [m, n])."""
    decider = f"cascade {next(_NUMBERS)}"
    right: list[Tensor] = []
    thin: list[Tensor] = []
    try:
        with evaluating(model), torch.no_grad():
            for batch in track(batches, "setting the cascade", show=progress):
                if reference is None:
                    apply(model, highest_map(model), decider=decider)
                decided_n = _OBJECTIVE.outcome(run(reference or model, batch), batch).argmax(1)
                count = _count(*_arguments(batch))
                if len(decided_n) != count:
                    raise BudgetError(
                        f"the output has {len(decided_n)} rows of logits for {count} samples: a cascade needs a "
                        "classifier, whose logits are [B, C]"
                    )
                right_m, thin_m = [], []
                for index in indices:
                    apply(model, chain[index], decider=decider)
                    logits_nC = _OBJECTIVE.outcome(run(model, batch), batch)
                    right_m.append(logits_nC.argmax(1) == decided_n)
                    thin_m.append(margins(logits_nC))
                right.append(torch.stack(right_m))
                thin.append(torch.stack(thin_m))
    finally:
        withdraw(model, decider)
    return torch.cat(right, 1), torch.cat(thin, 1)


def _verdict(
    model: nn.Module,
    made: Cascade,
    alone: int,
    batches: Sequence[Any],
    agreement: float,
    reference: nn.Module | None,
    progress: bool,
) -> CascadeVerdict:
    """What the cascade and the single map, at index `alone`, give on other samples."""
    maps = [made.low, made.high, alone]
    right_3n, margins_3n = _measured(model, made.frontier, maps, batches, reference, progress)
    again_n = margins_3n[0] < made.threshold
    share = float(again_n.double().mean())
    return CascadeVerdict(
        agreement=float(torch.where(again_n, right_3n[1], right_3n[0]).double().mean()),
        bits=made.frontier.bits(made.low) + share * made.frontier.bits(made.high),
        static_agreement=float(right_3n[2].double().mean()),
        static_bits=made.frontier.bits(alone),
        share=share,
        samples=right_3n.shape[1],
        asked=agreement,
    )


def _arguments(batch: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The positional and the named arguments that a batch stands for, as `foveate.collect.objectives.run` takes it."""
    if isinstance(batch, Mapping):
        return (), batch
    return (batch if isinstance(batch, (tuple, list)) else (batch,)), {}


def _count(args: Sequence[Any], named: Mapping[str, Any]) -> int:
    """The samples of a call: the rows of its first tensor."""
    for value in (*args, *named.values()):
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    raise DataError("no argument is a tensor of samples: a cascade reads those whose margin is thin again")


def _selected(
    args: Sequence[Any], named: Mapping[str, Any], index: Tensor, count: int
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of some samples: the rows of all tensors that have a row for each."""

    def of(value: Any) -> Any:
        return value[index] if isinstance(value, Tensor) and value.dim() and value.shape[0] == count else value

    return [of(value) for value in args], {name: of(value) for name, value in named.items()}
