"""When a step's peak is recorded, for a budget in bytes: one plain step, from its first function to its last.

The recorder is a dispatch mode, and modes are entered and left between functions, not in the middle of one. So the
store says what it wants, and the scope does it before the next function is called.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from foveate.activations.forms.encodings import Exact, Nothing
from foveate.activations.memory.peak import PeakTracker, Token
from foveate.activations.memory.timeline import Timeline
from foveate.activations.saved_tensors import Payload


class Tracking:
    """Records one step, once it is asked to.

    Args:
        model: whose parameters, gradients and buffers are there before the step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tracker: PeakTracker | None = None
        self._wanted = False
        self.timeline: Timeline | None = None

    def want(self) -> None:
        """Record from the next function on."""
        self._wanted = True

    def done(self) -> None:
        """The step is over: keep what was recorded, and stop before the next function."""
        if self._tracker is not None and self.timeline is None:
            self.timeline = self._tracker.timeline()

    def between(self) -> None:
        """Between two functions: start or stop."""
        if self._wanted and self._tracker is None:
            held = [*self._model.parameters(), *self._model.buffers()]
            self._tracker = PeakTracker([*held, *(tensor.grad for tensor in held if tensor.grad is not None)])
            self._tracker.__enter__()  # type: ignore[no-untyped-call]
            self._wanted = False
        elif self.timeline is not None:
            self.leave()

    def leave(self) -> None:
        """Stop, if this is the mode on top; another's must go first. What is not done is recorded anew."""
        if self._tracker is not None and _get_current_dispatch_mode() is self._tracker:
            self._tracker.__exit__(None, None, None)
            self._tracker, self._wanted = None, self.timeline is None

    def stored(self, payload: Payload, tensor: Tensor) -> Token | None:
        """A payload was made of a tensor."""
        if self._tracker is None or self.timeline is not None or isinstance(payload.form, Nothing):
            return None
        held = [value for value in vars(payload.form).values() if isinstance(value, Tensor)]
        flat = tensor.detach().as_strided((payload.interval.length,), (1,), payload.interval.start)
        return self._tracker.stored(payload.site, held, payload.form.flat if isinstance(payload.form, Exact) else flat)

    def restored(self, token: Token | None, values: Tensor) -> None:
        """Backward was given a payload's values."""
        if token is not None and self._tracker is not None:
            self._tracker.restored(token, values)
