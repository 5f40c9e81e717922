"""What a profiled step measures from the gradient of a function's output: its mean square, and closed-form errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from foveate.activations.forms.identity import parameter_of
from foveate.activations.forms.rules import Rule
from foveate.activations.measure.closed_forms import conv_error, conv_options, linear_error
from foveate.activations.measure.scope import Call
from foveate.activations.recompute.recipes import StoredView
from foveate.activations.saved_tensors import Payload


def gradient_hook(
    payload: Payload, view: StoredView, rule: Rule, call: Call, in_extra_pass: Callable[[], bool]
) -> Callable[[Tensor], None]:
    """The hook for the gradient of one function that reads a payload in backward.

    Args:
        payload: the payload, which is rounded.
        view: how the function's tensor lies in it.
        rule: of the function.
        call: the call of the function.
        in_extra_pass: whether an extra backward pass is running, which measures nothing here.
    """
    shape, stride = view.shape, view.stride
    whole = view.offset == 0 and shape.numel() == payload.interval.length
    options: dict[str, Any] = {}
    kernel: tuple[int, ...] = ()
    key: int | None = None
    if rule.linear:
        weight = call.args[1] if len(call.args) > 1 else call.kwargs["weight"]
        origin = parameter_of(weight)
        if origin is not None:
            key = id(origin.parameter)
        elif weight.requires_grad and payload.record is not None:
            payload.record.site.closed = False  # a weight computed from parameters does not say their gradients
        if rule.linear == "conv":
            kernel, options = conv_options(call.args, call.kwargs)

    def measure(gradient: Tensor) -> None:
        record = payload.record
        if in_extra_pass() or record is None:
            return
        record.add_gradient(gradient.detach().abs().float().square().mean())
        if key is None:
            return  # not linear, or a frozen weight's
        if rule.linear == "conv" and whole:
            found_L = conv_error(record.variance_LQ, record.group, gradient, shape, stride, kernel, options)
        else:
            columns = shape[-1] if whole else payload.interval.length
            rows = gradient if whole else gradient.reshape(1, -1)
            found_L = linear_error(record.variance_LQ, record.group, rows, columns)
        record.add_closed(key, found_L)

    return measure
