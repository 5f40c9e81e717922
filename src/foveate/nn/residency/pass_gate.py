"""PassGate: whether a call of a model is running, in any thread, so that changes can be taken between two calls."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn

from foveate.errors import FoveateError

#: Seconds that a call waits for those of other threads, where changes are due; then it begins without them.
_PATIENCE_S = 1.0
#: Seconds after which the threads that are within a call are looked at again: one may have died there.
_LOOK_S = 0.5


class EagerHook:
    """A hook that a compiler does not trace: it would run when the compiler traces, and not when the model runs.

    A model that has one cannot be copied or pickled: a copy would share its memory.
    """

    def __init__(self, run: Callable[..., None]) -> None:
        # imports the compiler, which takes a second: not when foveate is imported
        self._run: Callable[..., None] = torch.compiler.disable(run)

    def __call__(self, *args: Any) -> None:
        """Run the hook."""
        self._run(*args)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise FoveateError(
            "a model whose planes are partly on disk cannot be copied or pickled: load its folder again, or save it "
            "with foveate.save"
        )


class PassGate:
    """Knows the threads that are within a call of a model.

    A call begins and ends by hooks. An interruption (Ctrl-C) runs no hooks, so a thread may be listed that has left its
    call; whether it has is then seen from its stack.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._changed = threading.Condition()
        self._running: set[threading.Thread] = set()
        self._closed = False

    @property
    def is_inside(self) -> bool:
        """Whether this thread is within a call of the model."""
        model, frame = self._model(), sys._getframe()
        while frame is not None:
            if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is model:
                return True
            frame = frame.f_back  # type: ignore[assignment]
        return False

    def begin(self, changes: Callable[[], None], due: Callable[[], bool], *, one_at_a_time: bool = False) -> None:
        """A call begins. Where changes are due it waits for other threads' calls to end, and takes them before.

        Args:
            changes: takes the changes.
            due: whether there are any.
            one_at_a_time: wait for other threads' calls in any case.
        """
        me = threading.current_thread()
        with self._changed:
            self._running.discard(me)  # left by an interruption
            self._changed.wait_for(lambda: not self._closed)
            while one_at_a_time and self._running:
                self._changed.wait(_LOOK_S)
                self._running = {thread for thread in self._running if thread.is_alive()}
            if self._running and due():
                self._changed.wait_for(lambda: not self._closed and not self._running, _PATIENCE_S)
                self._changed.wait_for(lambda: not self._closed)
            if not self._running:
                changes()
            self._running.add(me)

    def end(self) -> None:
        """A call has ended, or was ended by an exception."""
        with self._changed:
            self._running.discard(threading.current_thread())
            self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no call is running, and have new ones wait until the block ends.

        Raises:
            FoveateError: this thread is within a call, which would wait for itself.
        """
        me = threading.current_thread()
        with self._changed:
            if me in self._running and self.is_inside:
                raise FoveateError("memory cannot change within a call of the model: do it between two calls")
            self._running.discard(me)
            self._changed.wait_for(lambda: not self._closed)
            self._closed = True
            while self._running:
                self._changed.wait(_LOOK_S)
                self._running = {thread for thread in self._running if thread.is_alive()}
        try:
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()
