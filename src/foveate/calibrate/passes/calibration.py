"""The passes over a calibration set: a dry run, the first pass, and further passes where memory is short.

    dry run         with the first batch: what backward keeps, in which order weights are called, how long it takes
    schedule        made from what the dry run showed and the memory there is (`foveate.calibrate.schedule`)
    pass 1          all small statistics, and the large statistics of the first part of the weights
    pass 2, 3, ...  the large statistics of one other part each, as far into the model as that part goes

The caller takes the weights part by part from `Calibration.parts`, rounds them, and calls `Calibration.done` for each.
Where several processes share the calibration, each has the complete statistics of the weights that are its own, and
rounds those (`foveate.calibrate.processes`).
"""

from __future__ import annotations

import gc
import glob
import math
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from typing import Any

import psutil
import torch
from torch import nn

from foveate.calibrate.estimate import Timed, estimate, lower_bound
from foveate.calibrate.passes.costs import free_weight, parts_of_resumed, weight_costs
from foveate.calibrate.passes.options import COMPARING, DRY_RUN, FIRST_PASS, ROUNDING, CalibrationOptions, one_step
from foveate.calibrate.passes.stream import Stream
from foveate.calibrate.processes.group import Processes
from foveate.calibrate.processes.owners import owners
from foveate.calibrate.processes.resuming import ResumeFiles
from foveate.calibrate.processes.shards import SHARDS, Shards
from foveate.calibrate.reference_outputs import ReferenceOutputs, copied, reference_bytes
from foveate.calibrate.resuming import ResumeFile, sample_of
from foveate.calibrate.schedule import Schedule, make_schedule
from foveate.collect.collector import Collector
from foveate.collect.dry_run import DryRun, dry_run
from foveate.collect.evaluation import frozen
from foveate.collect.kinds import QuantizableWeight, listed, weight_matrix_shape
from foveate.collect.objectives import Custom, check_batches, run
from foveate.collect.reads import Reads, decode
from foveate.collect.replay import Replay
from foveate.errors import BudgetError, DataError, WeightError
from foveate.memory.available import free_memory
from foveate.progress import Bar, say
from foveate.sizes import format_bytes

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
        processes: who shares the calibration; one process alone has no others.
        owner: the process that rounds each weight, by the names of its modules.
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
        self._model, self.found, self._progress, self._bar = model, list(found), options.progress, bar
        self.processes = Processes(options.processes)
        self.processes.check_options(
            objective=None if options.objective is None else options.objective.name,
            loss=options.loss is not None,
            memory=options.memory is not None,
            resume=options.resume is not None,
            exact=None if options.exact is None else asdict(options.exact),
            weights=[entry.names[0] for entry in found],
        )
        memory = options.memory
        self._reads = Reads(model, found)
        free = free_memory() // self.processes.here
        batches = check_batches(batches)
        if self.processes.shared:  # copies: a data loader may reuse its memory
            batches = [copied(batch) for batch in batches]
        stream = iter(batches)
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
        self._check_processes(batches, first)
        self.owner = owners(model, self.found, self.processes.count)
        file, files, state = None, None, None
        if options.resume is not None:
            file = ResumeFile(path=options.resume, objective=objective, sample=sample_of(model, first))
            if self.processes.shared:
                files = ResumeFiles(file, self.processes, self.owner)
                if files.shards and options.progress:
                    say(f"going on from files that have {files.shards} of {SHARDS} parts of the data")
            elif file.path.exists():
                state = file.read()
            elif options.progress and any(file.path.parent.glob(f"{glob.escape(file.path.name)}.*-of-*")):
                say("there are files of several processes, which one with a group can go on from (torchrun)")
        self._resume = files or file
        self._costs = weight_costs(self.found, objective, self.dry_run)
        blocks, replayed = self.dry_run.smallest_cut()
        temporaries = _OUTPUT_COPIES * self.dry_run.output_bytes + _CALL_COPIES * self.dry_run.largest
        gc.collect()
        used = psutil.Process().memory_info().rss
        available = int(_MEMORY_FRACTION * free) if memory is None else memory - used
        reference = reference_bytes(first, self.dry_run.output_bytes)
        available = min(self.processes.told(available - reference))
        model_bytes = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        comfort = max(int(_COMFORT * model_bytes), _LEAST_COMFORT) if memory is None else None
        # beside the statistics of a shard each process has the totals of its own weights
        more = 1 + 1 / self.processes.count if self.processes.shared else 1
        costs = [
            replace(c, large_bytes=int(more * c.large_bytes), kept_bytes=int(more * c.kept_bytes)) for c in self._costs
        ]
        schedule = make_schedule(
            costs, self.dry_run.kept + temporaries, replayed + temporaries, temporaries, available, comfort
        )
        # it depends on the number of threads, and processes may have different ones
        self.schedule = Schedule(**self.processes.told(asdict(schedule))[0])
        if any(self.processes.told(memory is not None and self.schedule.peak > available)):
            raise BudgetError(
                f"memory (={format_bytes(memory or 0)}) is too little: the process takes {format_bytes(used)} "
                f"already, and quantizing this model {format_bytes(self.schedule.peak + reference)} more (smaller "
                "batches take less)"
            )
        if options.progress and self.schedule.peak >= _MEMORY_WORTH_SAYING:
            say(f"quantizing takes up to {format_bytes(self.schedule.peak + reference)} of memory beside the model")
        modules = dict(model.named_modules())
        replay = Replay([(name, modules[name]) for name in blocks] if self.schedule.replay else ())
        parts = [[self.found[i] for i in part] for part in self.schedule.parts]
        begun = files.keys if files is not None else state or ()
        if begun:
            parts = parts_of_resumed(self.found, self._costs, parts, begun)
        self._parts = parts
        self.collector = Collector(
            self.found,
            objective,
            held={name for entry in parts[0] for name in entry.names},
            replay=replay,
            shards=SHARDS if self.processes.shared else 1,
        )
        self.reference_outputs = ReferenceOutputs(objective, self.dry_run.samples, self.processes)
        self._data: Stream | Shards
        if isinstance(batches, list) and self.processes.shared:
            self.reference_outputs.choose(batches)
            self._data = Shards(batches, self.collector, self.processes, self.owner, files)
            return
        if state is not None:
            self.collector.restore(state)
        count = len(batches) if isinstance(batches, Sized) else None
        # batches of several passes are kept, so that each pass sees the same data
        self._data = Stream(chain([first], stream), count, self.collector, file, again=len(parts) > 1)

    def _check_processes(self, batches: Iterable[Any], first: Any) -> None:
        """Refuse processes that were given other models or data than the first: a sampler that shares out data does."""
        if isinstance(batches, list) and self.processes.shared:
            nothing = nn.Module()
            self.processes.check_same([sample_of(nothing, batch).tolist() for batch in batches], "batches")
            shapes = [float(n) for entry in self.found for n in weight_matrix_shape(entry.modules[0])]
            self.processes.check_same([shapes, sample_of(self._model, first).tolist()], "models")

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
                phase = f"pass {number + 1} of {self.passes}"
                with frozen(self._model):
                    batches = self._data.further_pass(names)
                    for index, batch in self._bar.track(phase, batches, total=self._data.count):
                        self.collector.add_large(self._model, batch, index, names)
            yield part

    def owns(self, entry: QuantizableWeight) -> bool:
        """Whether this process rounds a weight."""
        return self.owner[entry.names[0]] == self.processes.rank

    def done(self, entry: QuantizableWeight) -> None:
        """Free the large statistics of a weight that is rounded, and the float weight where memory is short."""
        for name in entry.names:
            self.collector.by_module[name].release()
        if self.schedule.free_early and any(entry is last for last in self._parts[-1]):
            free_weight(entry)

    def free_weights(self) -> None:
        """Free all float weights where memory is short; call it when all weights are rounded."""
        if self.schedule.free_early:
            for entry in self.found:
                free_weight(entry)

    def finish(self) -> None:
        """Free all float weights and delete the resume file; call it when the model runs on planes."""
        for entry in self.found:
            free_weight(entry)
        if self._resume:
            self._resume.delete()

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
        timed = False
        with frozen(self._model), self._reads.watching():
            for index, batch in self._bar.track(FIRST_PASS, self._data.first_pass(), total=self._data.count):
                wanted = self.reference_outputs.wants(index, batch)
                if index < self._data.done:
                    if wanted:
                        with torch.no_grad():
                            self.reference_outputs.keep(index, batch, run(self._model, batch))
                    continue
                started = time.perf_counter()
                keep = partial(self.reference_outputs.keep, index, batch) if wanted else None
                self.collector.add(self._model, batch, index, keep)
                if not timed:
                    self._say_how_long(time.perf_counter() - started)
                    timed = True
        self._reads.take(self.processes.told(self._reads.report()))

    def _say_how_long(self, batch: float) -> None:
        """Tell the bar what to expect, and print an estimate, unless the time is short."""
        data = self._data
        batches = data.left
        if not self._progress or lower_bound(self._costs) + batch * (batches or 1) < _WORTH_SAYING:
            return
        rows = [sum(self.dry_run.rows.get(name, 0) for name in entry.names) for entry in self.found]
        # where the number of batches is not known, it is assumed to be enough for every weight
        processes, seen = self.processes.count, self.dry_run
        inputs = [math.inf if data.count is None else float(n * data.count * processes) for n in rows]
        timed = Timed(batch, seen.seconds, batches, seen.samples, processes)
        found = estimate(self._costs, inputs, self.schedule, timed)
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
        reached = {i: self.collector.last_call(i, needs) for i in self._data.places}
        if -1 in reached.values():
            return  # resumed: the order of some calls is not known, so passes run to the end
        for part in self._parts[:number]:
            for entry in part:
                if all(self.collector.first_call(i, entry.names) >= last for i, last in reached.items()):
                    free_weight(entry)
