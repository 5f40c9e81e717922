"""Records the memory of one step, for a budget in bytes: a step that measures nothing, from first function to last.

`PeakTracker` is a dispatch mode, and a mode must be entered and left between two functions. So the store requests a
recording or ends it, and the scope enters or leaves the mode before the next function is called.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from foveate.activations.forms.encodings import Exact, Nothing
from foveate.activations.memory.peak import PeakTracker, Token
from foveate.activations.memory.timeline import Timeline
from foveate.activations.saved_tensors import Payload


class PeakRecorder:
    """Records one step, after `request`.

    Args:
        model: whose parameters, gradients and buffers are there before the step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tracker: PeakTracker | None = None
        self._wanted = False
        self.timeline: Timeline | None = None

    def request(self) -> None:
        """Record from the next function on."""
        self._wanted = True

    def finish(self) -> None:
        """The step is over: keep its timeline, and stop before the next function."""
        if self._tracker is not None and self.timeline is None:
            self.timeline = self._tracker.timeline()

    def start_or_stop(self) -> None:
        """Between two functions: start a requested recording, or stop a finished one."""
        if self._wanted and self._tracker is None:
            held = [*self._model.parameters(), *self._model.buffers()]
            self._tracker = PeakTracker([*held, *(tensor.grad for tensor in held if tensor.grad is not None)])
            self._tracker.__enter__()  # type: ignore[no-untyped-call]
            self._wanted = False
        elif self.timeline is not None:
            self.stop()

    def stop(self) -> None:
        """Stop, if no other mode was entered later. An unfinished recording is requested again."""
        if self._tracker is not None and _get_current_dispatch_mode() is self._tracker:
            self._tracker.__exit__(None, None, None)
            self._tracker, self._wanted = None, self.timeline is None

    def stored(self, payload: Payload, tensor: Tensor) -> Token | None:
        """A payload was made of a tensor."""
        if self._tracker is None or self.timeline is not None or isinstance(payload.encoding, Nothing):
            return None
        held = [value for value in vars(payload.encoding).values() if isinstance(value, Tensor)]
        flat = tensor.detach().as_strided((payload.interval.length,), (1,), payload.interval.start)
        return self._tracker.stored(
            payload.site, held, payload.encoding.flat if isinstance(payload.encoding, Exact) else flat
        )

    def restored(self, token: Token | None, values: Tensor) -> None:
        """Backward was given a payload's values."""
        if token is not None and self._tracker is not None:
            self._tracker.restored(token, values)
