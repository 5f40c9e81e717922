"""CompressActivations: `compress_activations` as a callback of the transformers Trainer.

    step begins: enter | forward, backward, for each part of the batch | before the optimizer: leave | log

So evaluation, saving and the optimizer run outside the store. The Trainer does not tell a callback that a step failed.
If the model's forward fails, a hook on it leaves the store at once. After any other failure the store is left when
training ends or begins again, or when the callback is used as a context manager and that is left:

    with fv.CompressActivations(error=0.1) as saving:
        Trainer(model, arguments, train_dataset=data, callbacks=[saving]).train()
    print(saving.report())
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from foveate.activations.compress import compress_activations
from foveate.activations.report import SavedReport
from foveate.activations.store import ActivationStore
from foveate.errors import DataError, MissingExtraError


def _base() -> type:
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise MissingExtraError('CompressActivations needs transformers: pip install "foveate[cli]"') from error
    base: type = TrainerCallback
    return base


class CompressActivations:
    """A `transformers.TrainerCallback` that keeps what autograd saves in few bits while the Trainer trains.

    What it learned of a model stays with it: training again goes on from there. With each of the Trainer's logs of the
    training loss go `saved_ratio`, the bytes that plain training would hold for backward over those held in the latest
    step; `saved_error`, the gradient's predicted relative error; and `saved_error_audited`, that of the latest audit.
    They stand in `state.log_history` and in what is printed; callbacks that the Trainer calls before this one
    (its `report_to` integrations) have taken their copy by then.

    Args:
        settings: the keywords of `foveate.compress_activations`, which this passes on: `error=0.1`, `options=...`.

    Attributes:
        store: of the model that is trained; None before training begins.

    Raises:
        MissingExtraError: transformers is not installed.
        BudgetError, LevelError: when training begins, for settings that make no sense.
    """

    store: ActivationStore | None

    def __new__(cls, **settings: Any) -> CompressActivations:
        """An instance that is a `TrainerCallback` too; transformers is imported only now."""
        base = _base()
        whole = cls if issubclass(cls, base) else type(cls.__name__, (cls, base), {"__module__": cls.__module__})
        made: CompressActivations = object.__new__(whole)
        return made

    def __init__(self, **settings: Any) -> None:
        self.store = None
        self._settings = settings
        self._inside = False
        self._watch: RemovableHandle | None = None

    def __enter__(self) -> CompressActivations:
        return self

    def __exit__(self, *exception: object) -> None:
        self.leave()
        self._unwatch()

    def report(self) -> SavedReport:
        """What the store's latest step kept; raises `DataError` before training has begun."""
        if self.store is None:
            raise DataError("nothing was trained with this callback yet: there is nothing to report")
        return self.store.report()

    def leave(self) -> None:
        """Leave the store, if a step that failed did not; does nothing otherwise."""
        if self._inside and self.store is not None:
            self._inside = False
            self.store.__exit__(None, None, None)

    # --- what the Trainer calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the store of the model, or go on with it."""
        self.leave()
        self._unwatch()
        model: nn.Module = kwargs["model"]
        if self.store is None or self.store.model is not model:
            self.store = compress_activations(model, **self._settings)
        self._watch = model.register_forward_hook(self._seen, always_call=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Enter the store for all parts of a batch."""
        self.leave()
        if self.store is not None:
            self.store.__enter__()
            self._inside = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the store: the last backward of the step is over."""
        self.leave()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model as it was."""
        self.leave()
        self._unwatch()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Add to the logs of the training loss what is kept and what it does."""
        if self.store is None or logs is None or "loss" not in logs:
            return
        report = self.store.report()
        found = {"saved_ratio": report.ratio, "saved_error": report.predicted}
        if report.audits:
            found["saved_error_audited"] = report.audits[-1].audited
        found = {name: round(value, 6) for name, value in found.items() if math.isfinite(value)}
        logs.update(found)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(found)

    def _seen(self, module: nn.Module, args: Any, output: Any) -> None:
        if output is None:  # the forward failed
            self.leave()

    def _unwatch(self) -> None:
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
