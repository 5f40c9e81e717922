"""The processes that share a calibration, and what they tell each other.

All of them make the same calls in the same order. What one sends another is tensors, and values that JSON has: nothing
that could run as code.
"""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from foveate.errors import DataError, LostProcessError

#: Weights of different machines may differ in their last bits, as where adapters were merged.
_ALIKE = 1e-3


@contextmanager
def _reaching_others() -> Iterator[None]:
    """What torch raises where another process has ended or does not answer, as a sentence.

    Raises:
        LostProcessError: a message to or from another process failed.
    """
    try:
        yield
    except RuntimeError as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LostProcessError(
            f"another process that shares this calibration has ended or cannot be reached: {said}"
        ) from error


class Processes:
    """Some processes of a process group of torch, or one alone.

    Attributes:
        rank, count: the number of this process, from 0, and how many there are.
        here: how many of them run on this machine.
        shared: whether there is a group, of one process or more.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """
        Args:
            group: its backend for the CPU is gloo; None for one process alone.

        Raises:
            DataError: it is no group, this process is not in it, or it has no gloo.
        """
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise DataError(f"processes (={group!r}) is not a process group, such as torch.distributed.group.WORLD")
        self._group = group
        self.shared = group is not None
        self.rank = 0 if group is None else dist.get_rank(group)
        self.count = 1 if group is None else dist.get_world_size(group)
        if self.rank < 0:
            raise DataError("processes is a group that this process is not in")
        if group is not None and "gloo" not in str(dist.get_backend_config(group)):
            raise DataError(f"processes is a group of {dist.get_backend(group)}: calibration needs one of gloo")
        machine = socket.gethostname()
        self.here = self.told(machine).count(machine)

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, in the order of their ranks; they have one shape and dtype."""
        if self.count == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.count)]
        with _reaching_others():
            dist.all_gather(found, tensor.contiguous(), group=self._group)
        return found

    def handed_to(self, owner: int, tensor: Tensor) -> Iterator[Tensor]:
        """As `gathered`, on the process `owner`, one after another in the same memory; on the others nothing."""
        if self.rank != owner:
            with _reaching_others():
                dist.send(tensor.contiguous(), self._global(owner), group=self._group)
            return
        memory = torch.empty_like(tensor) if self.count > 1 else tensor
        for rank in range(self.count):
            if rank != owner:
                with _reaching_others():
                    dist.recv(memory, self._global(rank), group=self._group)
            yield tensor if rank == owner else memory

    def check_options(self, **options: Any) -> None:
        """Refuse, on all processes, options that differ among them: values that JSON has.

        Raises:
            DataError: the message names them.
        """
        said = self.told(options)
        different = sorted(name for name in options if any(one[name] != said[0][name] for one in said))
        if different:
            raise DataError(f"the processes that share a calibration have different options: {', '.join(different)}")

    def check_same(self, numbers: list[list[float]], what: str) -> None:
        """Refuse, on all processes, lists of numbers of which those of some process are not those of the first.

        Raises:
            DataError: the message says what differs.
        """
        first, *others = ([torch.tensor(one, dtype=torch.float64) for one in said] for said in self.told(numbers))
        for other in others:
            alike = len(first) == len(other) and all(
                a.shape == b.shape and torch.allclose(a, b, rtol=_ALIKE, atol=1e-6, equal_nan=True)
                for a, b in zip(first, other, strict=True)
            )
            if not alike:
                raise DataError(
                    f"the processes that share a calibration have different {what}: give all of them the same"
                )

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, the same on each, added in the order of their ranks."""
        parts = self.gathered(tensor)
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total

    def told(self, value: Any) -> list[Any]:
        """What each process says, in the order of their ranks: values that JSON has."""
        if self.count == 1:
            return [value]
        said = json.dumps(value).encode()
        lengths = [int(n) for n in self.gathered(torch.tensor([len(said)]))]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        parts = self.gathered(padded)
        return [json.loads(bytes(part[:n].numpy())) for part, n in zip(parts, lengths, strict=True)]

    def sent(self, value: Any, source: int) -> Any:
        """What the process `source` sends to all: tensors, numbers, text and types of torch, in lists and mappings."""
        if self.count == 1:
            return value
        held = io.BytesIO()
        if self.rank == source:
            torch.save(value, held)
        length = torch.tensor([held.tell()])
        with _reaching_others():
            dist.broadcast(length, self._global(source), group=self._group)
        data = torch.empty(int(length), dtype=torch.uint8)
        if self.rank == source:
            data = torch.frombuffer(held.getbuffer(), dtype=torch.uint8)
        with _reaching_others():
            dist.broadcast(data, self._global(source), group=self._group)
        if self.rank == source:
            return value
        return torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.gathered(torch.zeros(1))

    def _global(self, rank: int) -> int:
        assert self._group is not None
        return dist.get_global_rank(self._group, rank)
