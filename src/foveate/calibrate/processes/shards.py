"""The data of a calibration that several processes share.

The data are cut into a fixed number of shards, whatever the number of processes, and each process takes one shard after
another. The statistics of a shard are collected from the beginning. When all processes have finished one, these are
added to the totals in the order of the shards. So the result does not depend on how many processes there are.

    round 1    shard 0 on process 0, shard 1 on process 1, ...    totals += shard 0, += shard 1, ...
    round 2    the next shards                                    and so on

Totals of matrices are needed only where the weight is rounded, so only that process has them. All others, which are
small, every process has.

Between rounds each process writes its totals to a resume file of its own. Any number of processes can go on from a
complete set of these files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.calibrate.processes.group import Processes
from foveate.calibrate.processes.resuming import ResumeFiles
from foveate.collect.collector import Collector
from foveate.collect.sums import MATRICES, add, clear, statistic_of
from foveate.errors import DataError

#: How many shards the data are cut into. More processes than that share only the rounding.
SHARDS = 16


class Shards:
    """Hands out the batches of this process, and adds up the statistics of all of them.

    Attributes:
        count: how many batches are handed out in a pass.
        done: batches before this place in the data are in the totals already.
        left: how many are to be seen.
        places: the places of the batches that are handed out.
    """

    def __init__(
        self,
        batches: Sequence[Any],
        collector: Collector,
        processes: Processes,
        owner: Mapping[str, int],
        resume: ResumeFiles | None,
    ) -> None:
        """
        Args:
            batches: all data, the same on all processes.
            collector: empty; after a pass it holds the totals.
            processes: who shares the data.
            owner: the process that rounds each weight, by the names of its modules.
            resume: the files that keep totals; none are written if not given. What they hold already is taken.
        """
        self._batches, self._collector, self._owner = batches, collector, owner
        self._processes, self._resume = processes, resume
        self._begun = 0 if resume is None else resume.shards
        self._totals: dict[str, Tensor] = {} if resume is None else resume.totals
        mine = range(processes.rank, SHARDS, processes.count)
        self.places = [place for shard in mine for place in self._places_of(shard)]
        self.count = len(self.places)
        self.done = self._places_of(self._begun).start
        self.left = sum(place >= self.done for place in self.places)
        if self._begun:
            self._check()

    def _check(self) -> None:
        """Refuse totals that are not those of this model."""
        state = {key: (t.shape, t.dtype) for key, t in self._collector.state().items() if self._needs(key)}
        if {key: (t.shape, t.dtype) for key, t in self._totals.items()} != state:
            raise DataError("the resume files were made for another model or objective: delete them to start afresh")
        seen = int(self._totals["batches"])
        if seen != self.done:
            raise DataError(
                f"the resume files have seen {seen} batches in {self._begun} of {SHARDS} shards, which are {self.done} "
                f"of the {len(self._batches)} given: give the same data, or delete the files to start afresh"
            )

    def _needs(self, key: str) -> bool:
        """Whether this process needs the total."""
        return statistic_of(key) not in MATRICES or self._owner[key.rpartition("|")[0]] == self._processes.rank

    def _places_of(self, shard: int) -> range:
        count = len(self._batches)
        return range(min(shard, SHARDS) * count // SHARDS, min(shard + 1, SHARDS) * count // SHARDS)

    def first_pass(self) -> Iterator[tuple[int, Any]]:
        """The batches with their places. Before the next one is asked for, each is seen, unless it is done."""
        keys = list(self._collector.state())
        for first, batches in self._rounds():
            yield from batches
            done = min(first + self._processes.count, SHARDS)
            if done > self._begun:
                self._add(keys)
                if self._resume is not None:
                    self._resume.write(self._totals, done)
        self._finish(keys)

    def further_pass(self, names: Collection[str]) -> Iterator[tuple[int, Any]]:
        """The batches again, with their places; before the next one is asked for, matrices of some modules grow."""
        keys = [
            f"{name}|{statistic}"
            for name in sorted(names)
            for statistic in self._collector.by_module[name].tensors
            if statistic in (*MATRICES - {"gradients_BRR"}, "covariance_rows")
        ]
        for _, batches in self._rounds():
            yield from batches
            self._add(keys)
        self._finish(keys)

    def _rounds(self) -> Iterator[tuple[int, Iterator[tuple[int, Any]]]]:
        """(the first shard of the round, the batches of this process)."""
        for first in range(0, SHARDS, self._processes.count):
            places = self._places_of(first + self._processes.rank)
            yield first, ((place, self._batches[place]) for place in places)

    def _add(self, keys: Sequence[str]) -> None:
        """Add the statistics of one shard of each process to the totals, and begin the next."""
        state = self._collector.state()
        small = [key for key in keys if statistic_of(key) not in MATRICES]
        flat = torch.cat([torch.empty(0, dtype=torch.float64), *(state[key].double().reshape(-1) for key in small)])
        sizes = [state[key].numel() for key in small]
        for part in self._processes.gathered(flat):
            for key, values in zip(small, part.split(sizes), strict=True):
                like = state[key]
                add(key, self._total(key, like), values.view(like.shape).to(like.dtype))
        for key in keys:
            if statistic_of(key) in MATRICES:
                owner = self._owner[key.rpartition("|")[0]]
                for part in self._processes.handed_to(owner, state[key]):
                    add(key, self._total(key, part), part)
        self._collector.clear(keys)

    def _total(self, key: str, like: Tensor) -> Tensor:
        if key not in self._totals:
            self._totals[key] = torch.empty_like(like)
            clear(key, self._totals[key])
        return self._totals[key]

    def _finish(self, keys: Sequence[str]) -> None:
        """Let the collector hold the totals, and of the matrices only those that this process needs."""
        for name, owner in self._owner.items():
            if owner != self._processes.rank:
                self._collector.by_module[name].release()
        for key in keys:
            if key in self._totals:
                self._collector.put(key, self._totals.pop(key))
