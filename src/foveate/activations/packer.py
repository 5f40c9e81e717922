"""How one saved tensor is packed: without loss where that is possible, else rounded at its site's level.

    a tensor -> the flat run of values that it occupies -> a lossless encoding, if one fits -> else the level's encoding

A profiled step also measures each rounded tensor here: the variance of its rounding, and statistics of its values. A
probed step holds a second rounding of it, and an audited step holds the exact values beside the rounded ones.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from foveate.activations.forms.encodings import GROUPED_LEVELS, Exact, Grouped, grouped
from foveate.activations.forms.identity import Interval, without_repeats
from foveate.activations.forms.lossless import lossless
from foveate.activations.forms.rules import Need, Rule, bounds_of, rule_of
from foveate.activations.measure.ledger import family_of, grouped_bytes
from foveate.activations.measure.scope import Call
from foveate.activations.measure.steps import Record, Step
from foveate.activations.policy.choose import LEVELS
from foveate.activations.policy.options import Settings
from foveate.activations.policy.planner import Planner
from foveate.activations.saved_tensors import Payload

_ROUNDED = (torch.float32, torch.bfloat16, torch.float16)


class Packer:
    """Packs tensors, and draws the random bits of their rounding from a generator of its own.

    Args:
        settings: of the store.
        planner: says the level of each site, and holds the ledger.
    """

    def __init__(self, settings: Settings, planner: Planner) -> None:
        self._options, self._planner = settings.options, planner
        self._random = random.Random(settings.options.seed)

    def pack(self, tensor: Tensor, interval: Interval, need: Need, name: str, call: Call, step: Step) -> Payload:
        """The payload that stores a tensor.

        Args:
            tensor: as autograd saves it.
            interval: what it occupies of its storage.
            need: what backward needs of it.
            name: of its site.
            call: the call that saves it.
            step: in which it is saved.
        """
        data = tensor.detach()
        if interval.dense:
            flat = data.as_strided((interval.length,), (1,), interval.start)
        else:
            flat = without_repeats(data).contiguous().view(-1)
        rule = rule_of(call.function)
        bounds = bounds_of(call.function, call.args, call.kwargs) if need is Need.INSIDE else None
        if need is Need.INSIDE and bounds is None:
            need = Need.EXACT
        constant = not (tensor.requires_grad or rule.linear)
        encoding, need = lossless(flat, need, bounds, constant, self._options.smallest)
        payload = Payload(name, step, need, interval, encoding)
        if not interval.dense:
            payload.layout = (tensor.shape, tensor.stride())
        if need is Need.VALUES and flat.dtype in _ROUNDED:
            self._round(payload, flat, rule)
        elif (
            isinstance(encoding, Exact)
            and interval.dense
            and rule.need is not Need.LEAVE
            and 2 * flat.nbytes < data.untyped_storage().nbytes()
        ):
            payload.encoding = Exact(flat.clone())  # or a small part would keep a large storage alive
        return payload

    def _round(self, payload: Payload, flat: Tensor, rule: Rule) -> None:
        """Store a run of floats at its site's level, and what the step measures beside it."""
        step, name = payload.step, payload.site
        site = self._planner.ledger.site(name, rule)
        group = self._options.group or site.group
        site.count(grouped_bytes(flat.numel(), group, flat.element_size()), step.number)
        level = self._planner.level_of(name)
        if level < 8 * flat.element_size():
            payload.encoding = grouped(flat, level, group, self._seed()) or payload.encoding
        payload.lossy = isinstance(payload.encoding, Grouped)
        if step.audited and payload.lossy:
            payload.exact = Exact(flat)
        if step.profiled and (payload.lossy or torch.isfinite(flat).all()):
            variance_LQ = torch.ops.foveate.group_variance(flat, list(GROUPED_LEVELS), group)
            record = payload.record = Record(site, variance_LQ, group, level if payload.lossy else LEVELS[-1])
            if not site.closed and family_of(name) in step.probed:
                record.other = min(level, 8)
                payload.other = grouped(flat, record.other, group, self._seed())
            step.records.append(record)
            site.statistics.add(flat)

    def _seed(self) -> int:
        return self._random.getrandbits(62)
