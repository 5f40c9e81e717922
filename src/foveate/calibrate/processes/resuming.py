"""The files that a shared calibration is resumed from.

After each round every process writes a file with the totals that it has: `NAME.4.1-of-2` is that of process 1 of 2
after four shards. When all have written theirs, the files of the round before are deleted. So there is always a
complete set, wherever the processes were ended. All processes see the same folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from foveate.calibrate.processes.group import Processes
from foveate.calibrate.resuming import ResumeFile
from foveate.collect.sums import MATRICES, statistic_of


class ResumeFiles:
    """Writes and reads the files.

    Attributes:
        shards: how many shards are in the totals that were found; 0 if there were none.
        totals: those that this process needs.
        keys: the names of all totals that were found, also of those that other processes need.
    """

    def __init__(self, file: ResumeFile, processes: Processes, owner: Mapping[str, int]) -> None:
        """
        Args:
            file: its path is the beginning of the names of all files; it knows the model and the data.
            processes: who shares the calibration.
            owner: the process that needs the matrices of each module.

        Raises:
            DataError: a file is damaged, or of another model, objective, or other data.
        """
        self._file, self._processes = file, processes
        self.shards, count = processes.told(self._newest())[0]
        self.totals: dict[str, Tensor] = {}
        self.keys: set[str] = set()
        for rank in range(count):
            for key, tensor in file.at(self._path(self.shards, rank, count)).read().items():
                self.keys.add(key)
                is_matrix = statistic_of(key) in MATRICES
                if not is_matrix or owner.get(key.rpartition("|")[0]) == processes.rank:
                    self.totals[key] = tensor

    def _path(self, shards: int, rank: int, count: int) -> Path:
        return self._file.path.with_name(f"{self._file.path.name}.{shards}.{rank}-of-{count}")

    def _found(self) -> dict[tuple[int, int], set[int]]:
        """The ranks whose files are there, by the number of shards and of processes."""
        name = re.compile(re.escape(self._file.path.name) + r"\.(\d{1,3})\.(\d{1,5})-of-(\d{1,5})")
        found: dict[tuple[int, int], set[int]] = {}
        folder = self._file.path.parent
        for path in folder.iterdir() if folder.is_dir() else ():
            if (match := name.fullmatch(path.name)) is not None:
                shards, rank, count = map(int, match.groups())
                found.setdefault((shards, count), set()).add(rank)
        return found

    def _newest(self) -> tuple[int, int]:
        """(shards, processes) of the complete set with the most shards; zeros if there is none."""
        complete = [key for key, ranks in self._found().items() if ranks >= set(range(key[1]))]
        return max(complete, default=(0, 0))

    def write(self, totals: Mapping[str, Tensor], shards: int) -> None:
        """Write the totals of this process after so many shards, and delete older files when all have done so.

        Raises:
            DataError: the file cannot be written.
        """
        rank, count = self._processes.rank, self._processes.count
        mine = {k: t for k, t in totals.items() if statistic_of(k) in MATRICES or not rank}
        self._file.at(self._path(shards, rank, count)).write(mine)
        self._processes.wait()
        self._delete(but=(shards, count))

    def delete(self) -> None:
        """Delete all files; every process may call this."""
        self._delete(but=None)

    def _delete(self, but: tuple[int, int] | None) -> None:
        if self._processes.rank == 0:
            for (shards, count), ranks in self._found().items():
                for rank in ranks if (shards, count) != but else ():
                    self._path(shards, rank, count).unlink(missing_ok=True)
