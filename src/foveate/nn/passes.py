"""Passes: one call of the outermost module, which reads one generation of levels from beginning to end.

The hooks of a quantized model mark where a pass begins and ends (`foveate.kernels.planes.generations` says what a pass
is). Products take the book of the model, by which the kernels find the pass that is open in their thread.

Which class each row of the next passes belongs to is set for a thread (`Passes.set_rows`). The kernels know the rows of
a pass by the first dimension of what the outermost module is given; a tensor of integers [B, S] is B rows of S tokens.

Limits: a model that calls itself within its own forward ends the outer pass early. Where torch.utils.checkpoint runs a
part again during backward, that part reads the newest generation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from foveate.errors import DataError

#: The class of each row, or a function that says what it is now.
Classes: TypeAlias = Sequence[int] | Callable[[], Sequence[int]]


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.is_open = False
        self.begun = 0
        self.classes: Classes | None = None
        self.given: list[int] | None = None  # what the kernels were told last


class Passes:
    """Where the passes of one model begin and end: `begin` and `end` are hooks on the quantized module.

    Attributes:
        book: stands for the generations of the model; see the op `generation_book`.
    """

    def __init__(self) -> None:
        self.book = torch.empty(0, dtype=torch.int64)
        self._here = _OfThread()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy of a model has generations of its own, which its registry binds

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def bind(self, book: Tensor) -> None:
        """Take the book of the model."""
        self.book = book

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook with keywords."""
        if torch.compiler.is_exporting():
            return
        rows, length = _shape_of_call(args, kwargs)
        if not torch.compiler.is_dynamo_compiling():
            if callable(self._here.classes):
                now = self._here.classes()
                if now != self._here.given:
                    self._tell(now)
            classes = self._here.given
            if classes is not None and rows is not None and len(classes) not in (rows, rows * max(length, 1)):
                raise DataError(f"precision was asked for {len(classes)} rows, and the model is given {rows}")
            self._here.is_open = True
            self._here.begun += 1
        torch.ops.foveate.begin_pass(self.book, length)

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward hook that runs even if the call raised."""
        if torch.compiler.is_exporting():
            return
        torch.ops.foveate.end_pass(self.book)
        if not torch.compiler.is_dynamo_compiling():
            self._here.is_open = False

    def pinned(self) -> int:
        """Which of this thread's passes is open, counted from 1, in eager code; 0 outside of any."""
        return self._here.begun if self._here.is_open else 0

    def owners(self, count: int) -> Tensor | None:
        """The row of the pass that each of its `count` tokens belongs to, int64 [count], or -1 where that is not known;
        None where nothing was asked for rows, or the same for all.
        """
        found: Tensor = torch.ops.foveate.pass_owners(self.book, count)
        return found if found.numel() else None

    def set_rows(self, classes: Classes | None) -> Classes | None:
        """Give each row of this thread's next passes a class; None ends that.

        Args:
            classes: the class of each row: of each sequence of a batch, or of each token of packed sequences. If it is
                a function, it is asked before each eager pass, since numbers change where other classes come and go.

        Returns:
            The classes that were set before.
        """
        before = self._here.classes
        self._here.classes = classes
        self._tell(classes() if callable(classes) else classes)
        return before

    def _tell(self, classes: Sequence[int] | None) -> None:
        """Tell the kernels the class of each row."""
        self._here.given = None if classes is None else list(classes)
        given = None if classes is None else torch.tensor(self._here.given, dtype=torch.uint8)
        torch.ops.foveate.rows_of_passes(self.book, given)


def hooked_passes(model: nn.Module) -> Passes:
    """Put hooks on a model that begin and end its passes: the first before its forward, and the last after it."""
    passes = Passes()
    model.register_forward_pre_hook(passes.begin, prepend=True, with_kwargs=True)
    model.register_forward_hook(passes.end, always_call=True)
    return passes


def _shape_of_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int | None, int]:
    """(rows, tokens in each) of what a model is called with, by its first tensor; (None, 0) if there is none."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim():
            tokens = value.dim() > 1 and (value.dim() == 3 or not value.is_floating_point())
            return value.shape[0], value.shape[1] if tokens else 0
    return None, 0
