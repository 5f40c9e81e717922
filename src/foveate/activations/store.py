"""compress_activations: keep what autograd saves for backward in the fewest bits that a stated gradient error allows.

    forward saves a tensor -> lossless if it can be -> rounded at its site's level -> backward asks for it -> unpacked

The store decides per site (scope.py says which), from errors that are measured while the model trains (ledger.py,
steps.py) and by a policy that is a pure function of them (policy.py). A step that measures nothing does nothing but
find duplicates, pack and unpack.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.activations.forms.encodings import GROUPED_LEVELS, Exact, Form, Grouped, grouped
from foveate.activations.forms.identity import Interval, Shelf, interval_of, parameter_of, without_repeats, witness
from foveate.activations.forms.lossless import lossless
from foveate.activations.forms.rules import FUSED_FLOOR, UNKNOWN, Need, Rule, bounds_of, need_of, rule_of
from foveate.activations.measure.compiled import CompiledParts, note_reader
from foveate.activations.measure.gradient_hooks import gradient_watcher
from foveate.activations.measure.ledger import family_of, grouped_bytes
from foveate.activations.measure.scope import FOREIGN, Call, Scope
from foveate.activations.measure.second_backward import can_run_again
from foveate.activations.measure.steps import EXACT, Record, Step, arguments_of_backward
from foveate.activations.memory.recorder import Tracking
from foveate.activations.policy.choose import LEVELS
from foveate.activations.policy.options import Settings
from foveate.activations.policy.planner import RECORDED_STEP, Planner
from foveate.activations.policy.profile import load_profile_into, save_profile
from foveate.activations.recompute.attention import ATTENTION, Again, Attentions, are_sums
from foveate.activations.recompute.recipes import ELEMENTWISE, NORMS, Source
from foveate.activations.recompute.tracker import Recipes
from foveate.activations.report import SavedReport, report_of
from foveate.activations.saved_tensors import (
    Derived,
    Handle,
    Packed,
    Passed,
    Payload,
    Recast,
    changed,
    is_plain,
    passed,
    recast,
    source_of,
    version_of,
    with_gaps,
)
from foveate.errors import BudgetError, FoveateError

_ROUNDED = (torch.float32, torch.bfloat16, torch.float16)


class ActivationStore:
    """Stores what autograd saves while it is entered; made by `compress_activations`.

    It can be entered once for a whole training loop, or again for each step. Backward may run outside it, but only
    inside it are errors probed and audited.
    """

    def __init__(self, model: nn.Module, settings: Settings, profile: str | os.PathLike[str] | None = None) -> None:
        self.model, self.settings = model, settings
        self.planner = Planner(settings)
        if profile is not None:
            load_profile_into(self.planner.ledger, model, profile)
            self.planner.decide(None)
        self.steps = 0
        self.audits: list[tuple[int, float, float]] = []
        self.latest: Step | None = None
        watched = ELEMENTWISE | NORMS if settings.options.recompute else frozenset()
        self._scope = Scope(model, self._backward, self._called, watched)
        self._tracking = Tracking(model)
        if settings.bytes is not None:
            self._scope.between = self._tracking.between
        self._refused: FoveateError | None = None
        self._compiled = CompiledParts(settings)
        self._attentions = Attentions(self._view)
        self._recipes = Recipes(lambda tensor: self._found(tensor, interval_of(tensor), Need.VALUES))
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None
        self._shelf: Shelf[Payload] = Shelf()
        self._random = random.Random(settings.options.seed)
        self._step: Step | None = None
        self._reading = ""
        self._last: tuple[Form, Tensor] | None = None
        self._can_pass = True

    # --- entering and leaving

    def __enter__(self) -> ActivationStore:
        if self._hooks is not None:
            raise RuntimeError("the store is entered already")
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if top is not None and getattr(top[0], "__module__", "") == "torch.utils.checkpoint":
            warnings.warn(
                "compress_activations was entered inside a checkpointed function, whose recomputation that disables: "
                "enter it around the whole step",
                RuntimeWarning,
                stacklevel=2,
            )
        pack, unpack = torch.compiler.disable(self._pack), torch.compiler.disable(self._unpack)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
        hooks.__enter__()  # fails where torch forbids them
        self._hooks = hooks
        self._scope.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            self._tracking.leave()
            self._scope.__exit__(*exception)
            hooks.__exit__()
            if self._step is not None and self._step.begun:
                self._abandon()  # its backward failed
            self._last = None

    # --- forward

    def _pack(self, tensor: Tensor) -> Packed:
        if not is_plain(tensor):
            return passed(tensor)
        origin = parameter_of(tensor)
        interval = interval_of(tensor)
        if origin is not None:
            whole = interval.dense and interval.length == origin.parameter.numel() and interval.start == 0
            found = None
            if whole and not origin.views_only and type(origin.parameter) is nn.Parameter:
                found = recast(tensor, origin.parameter)
            return found or passed(tensor)
        call = self._scope.call
        # in backward: a graph of the gradient, or a recomputation, which is used at once
        if call.frame.module == FOREIGN or torch._C._current_graph_task_id() != -1:
            return passed(tensor)
        step = self._current_step()
        name = call.next_name()
        rule = rule_of(call.function)
        again = self._again(tensor, interval, call) if call.function == ATTENTION else None
        need = Need.AGAIN if again else need_of(rule, tensor, call.args, call.kwargs)
        payload = self._found(tensor, interval, need)
        if payload is None:
            if self._shelf.find(tensor, interval, lambda _: True) is None:
                step.original += min(interval.length, tensor.numel()) * tensor.element_size()
            if again:
                payload = self._held_by_others(Payload(name, step, need, interval, again))
            payload = payload or self._derived(tensor, interval, need, name, step)
            payload = payload or self._stored(tensor, interval, need, name, rule, step)
            payload.token = self._tracking.stored(payload, tensor)
            self._shelf.put(tensor, payload.interval, payload)
            step.stored(name, interval.length * tensor.element_size(), payload.form)
        elif payload.record is not None and not rule.linear:
            payload.record.site.closed = False
        source = source_of(payload, tensor)
        if not again:
            call.packed.append(source)
        return Handle(source, witness(tensor), tensor._version)

    def _derived(self, tensor: Tensor, interval: Interval, need: Need, name: str, step: Step) -> Payload | None:
        """A payload that holds nothing, where the tensor is a cheap function of others that are rounded."""
        if need is not Need.VALUES or interval.length < self.settings.options.smallest:
            return None
        recipe = self._recipes.find(tensor)
        if recipe is None or not self._may_run_again(recipe.roots):
            return None
        whole = Interval(0, tensor.untyped_storage().nbytes() // tensor.element_size(), True)
        return self._held_by_others(Payload(name, step, need, whole, Derived(recipe, self._view)))

    def _again(self, tensor: Tensor, interval: Interval, call: Call) -> Again | None:
        """How a result of attention that it saves is computed again, where its arguments are rounded."""
        call.tensors.append(tensor)
        whole = self.settings.options.recompute and interval.dense and interval.start == 0
        form = self._attentions.form(call, tensor) if whole else None
        if form is None and are_sums(call, tensor):
            self.planner.ledger.raise_floor({source.item.site for source in call.packed}, FUSED_FLOOR)
        return form if form is not None and self._may_run_again(form.roots) else None

    def _may_run_again(self, roots: Sequence[Payload]) -> bool:
        """Whether what is made from these may be made again: exact is to the bit where it is asked for."""
        return self.settings.levels is None or any(root.lossy for root in roots)

    def _held_by_others(self, payload: Payload) -> Payload:
        """Note that a payload is computed from others, whose errors are then no closed form."""
        for root in payload.rounded:
            if root.record is not None:
                root.record.site.closed = False
        if payload.site in self.planner.ledger.sites:
            self.planner.ledger.sites[payload.site].derived = True
        return payload

    def _found(self, tensor: Tensor, interval: Interval, need: Need) -> Payload | None:
        """What is stored already and serves the same need."""

        def fits(payload: Payload) -> bool:
            if payload.layout is not None and payload.layout != (tensor.shape, tensor.stride()):
                return False
            if need in (Need.VALUES, Need.EXACT):
                return payload.need in (Need.VALUES, Need.EXACT) and (need is Need.VALUES or not payload.lossy)
            return payload.need is need and need is not Need.INSIDE

        return self._shelf.find(tensor, interval, fits)

    def _stored(self, tensor: Tensor, interval: Interval, need: Need, name: str, rule: Rule, step: Step) -> Payload:
        data = tensor.detach()
        if interval.dense:
            flat = data.as_strided((interval.length,), (1,), interval.start)
        else:
            flat = without_repeats(data).contiguous().view(-1)
        call = self._scope.call
        bounds = bounds_of(call.function, call.args, call.kwargs) if need is Need.INSIDE else None
        if need is Need.INSIDE and bounds is None:
            need = Need.EXACT
        constant = not (tensor.requires_grad or rule.linear)
        form, need = lossless(flat, need, bounds, constant, self.settings.options.smallest)
        payload = Payload(name, step, need, interval, form)
        if not interval.dense:
            payload.layout = (tensor.shape, tensor.stride())
        if need is Need.VALUES and flat.dtype in _ROUNDED:
            self._round(payload, flat, rule)
        elif (
            isinstance(form, Exact)
            and interval.dense
            and rule.need is not Need.LEAVE
            and 2 * flat.nbytes < data.untyped_storage().nbytes()
        ):
            payload.form = Exact(flat.clone())  # or a small part would keep a large storage alive
        return payload

    def _round(self, payload: Payload, flat: Tensor, rule: Rule) -> None:
        """Store a float run at its site's level, with what the step measures beside it."""
        settings, step, name = self.settings, payload.step, payload.site
        site = self.planner.ledger.site(name, rule)
        group = settings.options.group or site.group
        site.count(grouped_bytes(flat.numel(), group, flat.element_size()), step.number)
        level = self.planner.level_of(name)
        if level < 8 * flat.element_size():
            payload.form = grouped(flat, level, group, self._seed()) or payload.form
        payload.lossy = isinstance(payload.form, Grouped)
        if step.audited and payload.lossy:
            payload.exact = Exact(flat)
        if step.profiled and (payload.lossy or torch.isfinite(flat).all()):
            variance_LQ = torch.ops.foveate.group_variance(flat, list(GROUPED_LEVELS), group)
            record = payload.record = Record(site, variance_LQ, group, level if payload.lossy else LEVELS[-1])
            if not site.closed and family_of(name) in step.probed:
                record.other = min(level, 8)
                payload.other = grouped(flat, record.other, group, self._seed())
            step.records.append(record)
            site.seen.see(flat)

    def _seed(self) -> int:
        return self._random.getrandbits(62)

    def _called(self, call: Call, result: Any) -> None:
        """A function has returned: note how to compute it again; in profiled steps, wait for its gradient."""
        if isinstance(result, Tensor) and call.function in self._scope.watched:
            self._recipes.note(call, result)
        if self._step is None or not self._step.profiled:
            return
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        differentiable = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad and not o.is_leaf]
        if not differentiable:
            return
        for source in call.packed:
            payload = source.item
            rule = UNKNOWN if isinstance(payload.form, Derived) else rule_of(call.function)
            for stored in payload.rounded:
                if stored.record is not None:
                    stored.record.watch(len(differentiable) == 1)
                    watch = gradient_watcher(stored, source, rule, call, lambda: bool(self._reading))
                    differentiable[0].register_hook(watch)

    # --- backward

    def _unpack(self, packed: Packed) -> Tensor:
        if isinstance(packed, Passed):
            if packed.version is not None and packed.tensor._version != packed.version:
                raise changed(packed.version, packed.tensor._version, packed.tensor.shape)
            return packed.tensor
        if isinstance(packed, Recast):
            if packed.parameter._version != packed.version:
                raise changed(packed.version, packed.parameter._version, packed.shape)
            return packed.values()
        if packed.witness._version != packed.version:
            raise changed(packed.version, packed.witness._version, packed.source.shape)
        step = packed.source.item.step
        if not self._reading and torch._C._current_graph_task_id() != -1:  # else somebody looks at what a node holds
            if not step.begun:
                self._begin(step)
            elif step.over:
                self.planner.read_late(packed.source.item.rounded)
            note_reader(step, packed.source.item.site)
        return self._view(packed.source)

    def _view(self, source: Source) -> Tensor:
        """A tensor as it lies in what is stored."""
        if (found := version_of(source.item)) != source.version:  # what a recipe reads, no handle has checked
            raise changed(source.version, found, source.shape)
        values = self._values(source.item)
        if source.item.layout is not None:
            return with_gaps(values, source.item.layout, not source.item.lossy)
        return values.as_strided(source.shape, source.stride, int(values.storage_offset()) + source.offset)

    def _values(self, payload: Payload) -> Tensor:
        form = payload.form
        if self._reading == EXACT:
            form = payload.exact or form
        elif self._reading and payload.other is not None and family_of(payload.site) == self._reading:
            form = payload.other
        last = self._last
        if last is not None and last[0] is form:  # q, k and v ask for one input, one after another
            return last[1]
        values = form.values()
        self._tracking.restored(payload.token, values)
        self._last = (form, values)
        return values

    def _backward(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Backward is called: run the step's extra passes before it."""
        step = self._step
        if step is not None and not step.begun and step.wants_passes and self._can_pass:
            found = arguments_of_backward(args, kwargs)
            if found is not None:
                parameters = list(self._parameters().values())
                self._can_pass = can_run_again(found[0], parameters) and step.run_passes(*found, parameters, self._read)
        try:
            return func(*args, **kwargs)
        except BaseException:
            self._abandon()
            raise

    def _read(self, what: str) -> None:
        self._reading, self._last = what, None

    def _parameters(self) -> dict[str, Tensor]:
        plain = (Tensor, nn.Parameter)
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad and type(p) in plain}

    def _current_step(self) -> Step:
        """The step that is being stored; a new one where the last one's backward is over or failed."""
        self._last = None
        if self._step is not None and (self._step.begun or (self._shelf.empty and self._step.kept)):
            self._abandon()  # its backward failed, or its graph was dropped
        if self._step is None:
            self._step = self.planner.step(self.steps, self._can_pass)
            self._scope.restart()
        return self._step

    def _abandon(self) -> None:
        """Forget a step that will not be finished."""
        if self._step is not None:
            self._step.drop()
            self.planner.ledger.forget(self._step.kept, self._step.number)
        self._step, self._last = None, None
        self._recipes.clear()

    def _begin(self, step: Step) -> None:
        self._recipes.clear()
        step.begin(self._parameters() if self._hooks is not None else {})
        torch.autograd.Variable._execution_engine.queue_callback(lambda: self._finish(step))

    def _finish(self, step: Step) -> None:
        """Backward is over: learn from the step, and decide the levels of the next."""
        self._last = None
        step.finish(self.planner.ledger)
        if step.audit is not None:
            self.audits.append((step.number, step.foretold, step.audit))
            if self.settings.error is not None and step.audit > self.settings.error:
                self.planner.ledger.doubt()
        self.steps += 1
        self.latest = step
        if self._step is step:
            self._step = None
        if self.settings.bytes is not None:
            self._tracking.want() if step.number < RECORDED_STEP else self._tracking.done()
        if step.profiled or step.audited or step.number == RECORDED_STEP:
            try:
                self.planner.decide(self._tracking.timeline)
            except BudgetError as refused:
                self._refused = refused
        self._refused = self._refused or self.planner.unseen_patterns(step)
        self._compiled.finished(step)
        if self._refused is not None:
            raise self._refused

    def save_profile(self, path: str | os.PathLike[str]) -> None:
        """Write what was measured of the model's sensitivity, for `compress_activations(profile=)` and for people.

        Raises:
            CheckpointError: the file cannot be written.
        """
        save_profile(self.planner.ledger, self.model, path)

    def report(self) -> SavedReport:
        """What the latest finished step kept, and what that is predicted and was audited to do to the gradient."""
        return report_of(self.latest, self.planner.ledger, self.audits, self.settings.error)
