"""What a profiled step learns when the gradient of a function's output comes by: its size, and closed-form errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from foveate.activations.forms.identity import parameter_of
from foveate.activations.forms.rules import Rule
from foveate.activations.measure import closed_forms as sensitivity
from foveate.activations.measure.scope import Call
from foveate.activations.recompute.recipes import Source
from foveate.activations.saved_tensors import Payload


def gradient_watcher(
    payload: Payload, source: Source, rule: Rule, call: Call, again: Callable[[], bool]
) -> Callable[[Tensor], None]:
    """What to do with the gradient of one consumer of a payload.

    Args:
        payload: what is rounded.
        source: how the consumer sees it.
        rule: of the consumer.
        call: the consumer.
        again: whether it is an extra pass that is running.
    """
    shape, stride = source.shape, source.stride
    whole = source.offset == 0 and shape.numel() == payload.interval.length
    options: dict[str, Any] = {}
    kernel: tuple[int, ...] = ()
    key: int | None = None
    if rule.linear:
        weight = call.args[1] if len(call.args) > 1 else call.kwargs["weight"]
        origin = parameter_of(weight)
        if origin is not None:
            key = id(origin.parameter)
        elif weight.requires_grad and payload.record is not None:
            payload.record.site.closed = False  # what reaches the parameters that it is made of is not known
        if rule.linear == "conv":
            kernel, options = sensitivity.conv_options(call.args, call.kwargs)

    def watch(gradient: Tensor) -> None:
        record = payload.record
        if again() or record is None:
            return
        record.add_gradient(gradient.detach().abs().float().square().mean())
        if key is None:
            return  # not linear, or a frozen weight's
        if rule.linear == "conv" and whole:
            found_L = sensitivity.conv_error(record.variance_LQ, record.group, gradient, shape, stride, kernel, options)
        else:
            columns = shape[-1] if whole else payload.interval.length
            rows = gradient if whole else gradient.reshape(1, -1)
            found_L = sensitivity.linear_error(record.variance_LQ, record.group, rows, columns)
        record.add_closed(key, found_L)

    return watch
