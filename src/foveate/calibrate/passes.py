"""The passes over a calibration set: a dry run, the first pass, and further passes where memory is short.

    dry run         with the first batch: what backward keeps, in which order weights are called, how long it takes
    schedule        made from what the dry run showed and the memory there is (`foveate.calibrate.schedule`)
    pass 1          all small statistics, and the large statistics of the first part of the weights
    pass 2, 3, ...  the large statistics of one other part each, as far into the model as that part goes

The caller takes the weights part by part from `Calibration.parts`, rounds them, and calls `Calibration.done` for each.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import Tensor, nn

from foveate.calibrate.estimate import Timed, estimate, lower_bound
from foveate.calibrate.reference_outputs import ReferenceOutputs, copied, reference_bytes
from foveate.calibrate.resuming import read_resume, sample_of, write_resume
from foveate.calibrate.schedule import Schedule, WeightCost, make_schedule
from foveate.collect.collector import Collector
from foveate.collect.dry_run import DryRun, dry_run
from foveate.collect.evaluation import frozen
from foveate.collect.kinds import Kind, QuantizableWeight, kind_of, listed, weight_matrix_shape
from foveate.collect.objectives import Custom, Objective, check_batches, run
from foveate.collect.reads import Reads, decode
from foveate.collect.replay import Replay
from foveate.collect.statistics import statistics_of
from foveate.errors import BudgetError, DataError, WeightError
from foveate.memory.available import free_memory
from foveate.progress import Bar, say
from foveate.rounding.exact import KeepExact
from foveate.sizes import format_bytes

#: Batches between two writes of the resume file; the first ones come sooner, after 1, 2, 4 and 8.
_SAVE_EVERY = 16
#: The part of the free memory that is used where no limit is given.
_MEMORY_FRACTION = 0.75
#: Where no limit is given, what calibration should take beside the model at most: so many times the bytes of the model.
_COMFORT, _LEAST_COMFORT = 2.0, 512 << 20
#: An estimate below this many seconds is not printed.
_WORTH_SAYING = 5.0
#: Memory below this many bytes is not mentioned.
_MEMORY_WORTH_SAYING = 1 << 30
#: How many tensors of the size of the output the objective and its backward take at once: output and direction.
_OUTPUT_COPIES = 3
#: How many tensors of the size of a layer's input its statistics, or its backward, take at once.
_CALL_COPIES = 2


#: The phases of quantizing, as progress names them. Further passes are `pass 2 of 3`.
DRY_RUN, FIRST_PASS, ROUNDING, PLANES, COMPARING = "dry run", "first pass", "rounding", "planes", "comparing"

#: Not a phase of its own: what of the passes was spent on statistics.
STATISTICS = "of it statistics"


@contextmanager
def one_step(bar: Bar, phase: str) -> Iterator[None]:
    """A phase that is a single piece of work."""
    for _ in bar.track(phase, (None,)):
        yield


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """What calibration optimizes for, and what it may use; as for `foveate.quantize`.

    Attributes:
        objective: what the output is for; inferred from the first output if not given.
        loss: the loss whose increase is kept small, instead of the objective's own.
        memory: the most bytes that the process may take; three quarters of the free memory if not given.
        resume: the file that keeps the statistics; no file if not given.
        progress: whether to show progress.
        exact: which tiles keep their exact values; none if not given.

    Raises:
        DataError: `objective` is not an `Objective`.
    """

    objective: Objective | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    memory: int | None = None
    resume: Path | None = None
    progress: bool = True
    exact: KeepExact | None = None

    def __post_init__(self) -> None:
        if self.objective is not None and not isinstance(self.objective, Objective):
            raise DataError(f"objective (={self.objective!r}) is not an Objective, such as foveate.Logits()")


class Calibration:
    """Runs the passes over the data.

    Attributes:
        found: the weights to quantize. Weights that other code than their modules' reads are removed by the time that
            the first part is handed out.
        notes: which weights stay float, and what is not known of the code that reads weights.
        first: the first batch.
        generates: whether generation is to be checked: the float model generated without an error, or cannot generate.
        collector: the statistics. The small ones are complete when the first part is handed out.
        schedule: how the calibration is carried out.
        dry_run: what the first batch showed.
        reference_outputs: outputs of the float model on some batches, complete when the first part is handed out.
    """

    collector: Collector
    schedule: Schedule
    dry_run: DryRun

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        found: Sequence[QuantizableWeight],
        options: CalibrationOptions,
        bar: Bar,
    ) -> None:
        """Make the dry run and the schedule.

        Args:
            model, batches: as for `foveate.quantize`.
            found: the weights to quantize.
            options: what calibration optimizes for.
            bar: shows the progress, and is told what to expect.

        Raises:
            DataError: there are no batches, or a resume file that cannot be used.
            WeightError: other code than their modules' reads every weight.
            BudgetError: the limit cannot be kept; the message says the least memory that is enough.
        """
        self._model, self.found, self._resume, self._progress = model, list(found), options.resume, options.progress
        self._bar = bar
        memory = options.memory
        self._reads = Reads(model, found)
        free = free_memory()
        stream = iter(check_batches(batches))
        first = next(stream, None)
        if first is None:
            raise DataError("there are no batches to calibrate on")
        self.first = copied(first)
        self.notes: list[str] = []
        with frozen(model), self._reads.watching(), one_step(bar, DRY_RUN):
            self.dry_run = dry_run(model, first, self.found, options.objective)
            self.generates = self._decoded()
        self._leave_read_weights()
        objective = self.dry_run.objective
        if options.loss is not None:
            objective = Custom(options.loss, objective)
        self._sample = sample_of(model, first)
        resume = self._resume
        state = read_resume(resume, objective, self._sample) if resume is not None and resume.exists() else None
        self._costs = _costs(self.found, objective, self.dry_run)
        blocks, replayed = self.dry_run.smallest_cut()
        temporaries = _OUTPUT_COPIES * self.dry_run.output_bytes + _CALL_COPIES * self.dry_run.largest
        gc.collect()
        used = psutil.Process().memory_info().rss
        available = int(_MEMORY_FRACTION * free) if memory is None else memory - used
        reference = reference_bytes(first, self.dry_run.output_bytes)
        available -= reference
        model_bytes = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        comfort = max(int(_COMFORT * model_bytes), _LEAST_COMFORT) if memory is None else None
        self.schedule = make_schedule(
            self._costs, self.dry_run.kept + temporaries, replayed + temporaries, temporaries, available, comfort
        )
        if memory is not None and self.schedule.peak > available:
            raise BudgetError(
                f"memory (={format_bytes(memory)}) is too little: the process takes {format_bytes(used)} already, and "
                f"quantizing this model {format_bytes(self.schedule.peak + reference)} more (smaller batches take less)"
            )
        if options.progress and self.schedule.peak >= _MEMORY_WORTH_SAYING:
            say(f"quantizing takes up to {format_bytes(self.schedule.peak + reference)} of memory beside the model")
        modules = dict(model.named_modules())
        replay = Replay([(name, modules[name]) for name in blocks] if self.schedule.replay else ())
        parts = [[self.found[i] for i in part] for part in self.schedule.parts]
        if state is not None:
            parts = _parts_of_resumed(self.found, self._costs, parts, state)
        self._parts = parts
        self.collector = Collector(
            self.found, objective, held={name for entry in parts[0] for name in entry.names}, replay=replay
        )
        self.reference_outputs = ReferenceOutputs(objective)
        if state is not None:
            self.collector.restore(state)
        self._count = len(batches) if isinstance(batches, Sized) else None
        self._stream = chain([first], stream)
        # batches of several passes are kept, so that each pass sees the same data
        self._kept: list[Any] | None = [] if len(parts) > 1 else None

    @property
    def passes(self) -> int:
        """The number of passes over the data."""
        return len(self._parts)

    def parts(self) -> Iterator[list[QuantizableWeight]]:
        """Make one pass over the data for each part, and hand out the weights whose statistics are complete.

        Raises:
            WeightError: other code than their modules' reads every weight.
        """
        self._first_pass()
        self._leave_read_weights()
        self._leave(self._reads.never_ran(self.found), "their modules have forwards of their own that never ran")
        kept = {entry.names[0] for entry in self.found}
        self._parts = [[entry for entry in part if entry.names[0] in kept] for part in self._parts]
        yield self._parts[0]
        for number in range(1, len(self._parts)):
            self._free_behind(number)
            part = self._parts[number]
            names = {name for entry in part for name in entry.names}
            names = {name for name in names if self.collector.by_module[name].large_bytes}
            if names:
                for name in names:
                    self.collector.by_module[name].hold()
                assert self._kept is not None
                with frozen(self._model):
                    for index, batch in enumerate(self._bar.track(f"pass {number + 1} of {self.passes}", self._kept)):
                        self.collector.add_large(self._model, batch, index, names)
            yield part

    def done(self, entry: QuantizableWeight) -> None:
        """Free the large statistics of a weight that is rounded, and the float weight where memory is short."""
        for name in entry.names:
            self.collector.by_module[name].release()
        if self.schedule.free_early and any(entry is last for last in self._parts[-1]):
            _free_weight(entry)

    def free_weights(self) -> None:
        """Free all float weights where memory is short; call it when all weights are rounded."""
        if self.schedule.free_early:
            for entry in self.found:
                _free_weight(entry)

    def finish(self) -> None:
        """Free all float weights and delete the resume file; call it when the model runs on planes."""
        for entry in self.found:
            _free_weight(entry)
        if self._resume:
            self._resume.unlink(missing_ok=True)

    def _leave_read_weights(self) -> None:
        """Remove the weights that other code than their modules' reads: such code cannot read planes."""
        own = {entry.names[0] for entry in self._reads.only_own(self.found)}
        past = [entry for entry in self.found if entry.names[0] not in own]
        who = self._reads.past[past[0].names[0]] if past else ""
        self._leave(past, f"other code than their modules' reads them, such as {who}")

    def _leave(self, entries: Sequence[QuantizableWeight], why: str) -> None:
        if not entries:
            return
        gone = {entry.names[0] for entry in entries}
        self.found = [entry for entry in self.found if entry.names[0] not in gone]
        self.notes.append(f"the weights of {listed([entry.names[0] for entry in entries])} stay float: {why}")
        if not self.found:
            raise WeightError(f"no weight can be quantized: {self.notes[-1]}")

    def _decoded(self) -> bool:
        """Let the float model generate, if it can; whether that raised no error."""
        try:
            decode(self._model)
        except Exception as error:  # calibration can go on without generation
            self.notes.append(f"what generation reads past modules is not known, for it fails: {error!r}")
            return False
        return True

    def _first_pass(self) -> None:
        done = self.collector.batches
        with frozen(self._model), self._reads.watching():
            for index, batch in enumerate(self._bar.track(FIRST_PASS, self._stream, total=self._count)):
                if self._kept is not None:
                    self._kept.append(batch)
                wanted = self.reference_outputs.wants(batch)
                if index < done:
                    if wanted:
                        with torch.no_grad():
                            self.reference_outputs.keep(batch, run(self._model, batch))
                    continue
                started = time.perf_counter()
                self.collector.add(self._model, batch, partial(self.reference_outputs.keep, batch) if wanted else None)
                seen = self.collector.batches
                if index == done:
                    self._say_how_long(time.perf_counter() - started, done)
                if self._resume is not None and self._saved_after(seen):
                    write_resume(self._resume, self.collector, self._sample)
        if self._resume is not None and not self._saved_after(self.collector.batches):
            write_resume(self._resume, self.collector, self._sample)

    @staticmethod
    def _saved_after(batches: int) -> bool:
        return batches % _SAVE_EVERY == 0 or batches in (1, 2, 4, 8)

    def _say_how_long(self, batch: float, done: int) -> None:
        """Tell the bar what to expect, and print an estimate, unless the time is short."""
        batches = None if self._count is None else self._count - done
        if not self._progress or lower_bound(self._costs) + batch * (batches or 1) < _WORTH_SAYING:
            return
        rows = [sum(self.dry_run.rows.get(name, 0) for name in entry.names) for entry in self.found]
        # where the number of batches is not known, it is assumed to be enough for every weight
        inputs = [math.inf if self._count is None else float(n * self._count) for n in rows]
        seen = self.dry_run
        found = estimate(self._costs, inputs, self.schedule, Timed(batch, seen.seconds, batches, seen.samples))
        say(str(found))
        if batches is not None:
            further = (found.passes - batch * batches) / max(self.passes - 1, 1)
            passes = {f"pass {number + 1} of {self.passes}": further for number in range(1, self.passes)}
            expected = {FIRST_PASS: batch * batches, **passes, ROUNDING: found.rounding, COMPARING: found.comparing}
            self._bar.expect(expected)

    def _free_behind(self, number: int) -> None:
        """Free the rounded float weights that no further pass runs, since they lie behind all parts that are left."""
        left = [name for part in self._parts[number:] for entry in part for name in entry.names]
        needs = [name for name in left if self.collector.by_module[name].large_bytes]
        if not self.schedule.free_early or any(self.collector.by_module[name].needs_gradients for name in needs):
            return
        batches = range(self.collector.batches)
        reached = [self.collector.last_call(i, needs) for i in batches]
        if -1 in reached:
            return  # resumed: the order of some calls is not known, so passes run to the end
        for part in self._parts[:number]:
            for entry in part:
                if all(self.collector.first_call(i, entry.names) >= reached[i] for i in batches):
                    _free_weight(entry)


def _costs(found: Sequence[QuantizableWeight], objective: Objective, seen: DryRun) -> list[WeightCost]:
    place: dict[str, list[int]] = {}
    for i, name in enumerate(seen.calls):
        place.setdefault(name, []).append(i)
    costs = []
    for entry in found:
        weight = cast(Tensor, entry.modules[0].weight)
        each = [statistics_of(module, objective) for module in entry.modules]
        at = [i for name in entry.names for i in place.get(name, [])]
        rows, columns = weight_matrix_shape(entry.modules[0])
        costs.append(
            WeightCost(
                rows=rows,
                columns=columns,
                copied=weight.dtype != torch.float32 or kind_of(entry.modules[0]) is Kind.LINEAR_TRANSPOSED,
                float_bytes=weight.numel() * weight.element_size(),
                large_bytes=sum(s.large_bytes for s in each),
                gradients=any(s.needs_gradients for s in each),
                first_call=min(at, default=-1),
                last_call=max(at, default=len(seen.calls)),
                kept_bytes=sum(s.kept_bytes for s in each),
            )
        )
    return costs


def _free_weight(entry: QuantizableWeight) -> None:
    """Free the memory of a float weight; its shape and dtype stay."""
    weight = cast(nn.Parameter, entry.modules[0].weight)
    if not weight.is_meta:
        empty = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=weight.requires_grad)
        for module in entry.modules:
            module.weight = empty


def _parts_of_resumed(
    found: Sequence[QuantizableWeight],
    costs: Sequence[WeightCost],
    parts: Sequence[list[QuantizableWeight]],
    state: dict[str, Tensor],
) -> list[list[QuantizableWeight]]:
    """The parts of a resumed calibration: the first pass keeps the weights whose large statistics it began."""
    begun = {key.rpartition("|")[0] for key in state if key.endswith(("|covariance_KK", "|fisher_NK"))}
    first = [e for e, cost in zip(found, costs, strict=True) if not cost.large_bytes or begun & set(e.names)]
    rest = [[entry for entry in part if not any(entry is one for one in first)] for part in parts]
    return [first, *(part for part in rest if part)]
