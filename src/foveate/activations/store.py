"""compress_activations: keep what autograd saves for backward in the fewest bits that a stated gradient error allows.

    forward saves a tensor -> lossless if it can be -> rounded at its site's level -> backward asks for it -> unpacked

This file holds the hooks of autograd and the order of events in a step. The ideas are in the folders beside it:

    forms/        which encoding gives back what an operation's backward needs
    recompute/    which tensors are computed again from others instead of being stored
    measure/      which site a tensor belongs to, and what rounding it does to the gradient
    memory/       what a step holds in memory at each moment
    policy/       which level each site gets: pure functions of what was measured

A step that measures nothing only finds duplicates, packs and unpacks. After ActNN, Chen et al. 2021.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.activations.forms.encodings import Encoding
from foveate.activations.forms.identity import (
    Interval,
    StorageIndex,
    interval_of,
    parameter_of,
    version_probe,
)
from foveate.activations.forms.rules import FUSED_FLOOR, UNKNOWN, Need, need_of, rule_of
from foveate.activations.measure.compiled import CompiledWarning, note_compiled_reader
from foveate.activations.measure.gradient_hooks import gradient_hook
from foveate.activations.measure.ledger import family_of
from foveate.activations.measure.scope import FOREIGN, Call, Scope
from foveate.activations.measure.second_backward import can_run_twice
from foveate.activations.measure.steps import EXACT, Step, arguments_of_backward
from foveate.activations.memory.recorder import PeakRecorder
from foveate.activations.packer import Packer
from foveate.activations.policy.options import Settings
from foveate.activations.policy.planner import RECORDED_STEP, Planner
from foveate.activations.policy.profile import load_profile_into, save_profile
from foveate.activations.recompute.attention import (
    ATTENTION,
    AttentionRecomputation,
    RecomputedAttention,
    may_be_logsumexp,
)
from foveate.activations.recompute.recipes import ELEMENTWISE, NORMS, StoredView
from foveate.activations.recompute.tracker import RecipeTable
from foveate.activations.report import SavedReport, report_of
from foveate.activations.saved_tensors import (
    Handle,
    Packed,
    ParameterCast,
    PassedThrough,
    Payload,
    RecomputedFunction,
    is_plain,
    modified_error,
    parameter_cast,
    pass_through,
    stored_view,
    version_of,
    with_gaps,
)
from foveate.errors import BudgetError, FoveateError


class ActivationStore:
    """Stores what autograd saves while it is entered; made by `compress_activations`.

    It can be entered once for a whole training loop, or again for each step. Backward may run outside it, but errors
    are probed and audited only inside it.

    Args:
        model: whose activations are stored.
        settings: the target and the options.
        profile: a file of measurements to start from.

    Attributes:
        planner: decides what each step measures, and the levels of the sites.
        steps: how many steps have finished.
        audits: (step, predicted error, audited error) of each audit.
        latest: the last step that finished.
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
        self._scope = Scope(model, self._backward, self._function_returned, watched)
        self._recorder = PeakRecorder(model)
        if settings.bytes is not None:
            self._scope.between = self._recorder.start_or_stop
        self._refused: FoveateError | None = None
        self._compiled = CompiledWarning(settings)
        self._attention = AttentionRecomputation(self._view)
        self._recipes = RecipeTable(lambda tensor: self._already_stored(tensor, interval_of(tensor), Need.VALUES))
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None
        self._index: StorageIndex[Payload] = StorageIndex()
        self._packer = Packer(settings, self.planner)
        self._step: Step | None = None
        self._reading = ""  # the name of the extra pass that is running, if one is
        self._last: tuple[Encoding, Tensor] | None = None
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
            self._recorder.stop()
            self._scope.__exit__(*exception)
            hooks.__exit__()
            if self._step is not None and self._step.begun:
                self._abandon()  # its backward failed
            self._last = None

    # --- forward

    def _pack(self, tensor: Tensor) -> Packed:
        if not is_plain(tensor):
            return pass_through(tensor)
        origin = parameter_of(tensor)
        interval = interval_of(tensor)
        if origin is not None:
            whole = interval.dense and interval.length == origin.parameter.numel() and interval.start == 0
            found = None
            if whole and not origin.views_only and type(origin.parameter) is nn.Parameter:
                found = parameter_cast(tensor, origin.parameter)
            return found or pass_through(tensor)
        call = self._scope.call
        # in backward a graph of the gradient is made, or a recomputation, whose tensors are used at once
        if call.frame.module == FOREIGN or torch._C._current_graph_task_id() != -1:
            return pass_through(tensor)
        step = self._current_step()
        name = call.next_name()
        rule = rule_of(call.function)
        attention = self._recomputed_attention(tensor, interval, call) if call.function == ATTENTION else None
        need = Need.RECOMPUTED if attention else need_of(rule, tensor, call.args, call.kwargs)
        payload = self._already_stored(tensor, interval, need)
        if payload is None:
            if self._index.find(tensor, interval, lambda _: True) is None:
                step.original += min(interval.length, tensor.numel()) * tensor.element_size()
            if attention:
                payload = self._mark_recomputed(Payload(name, step, need, interval, attention))
            payload = payload or self._by_recipe(tensor, interval, need, name, step)
            payload = payload or self._packer.pack(tensor, interval, need, name, call, step)
            payload.token = self._recorder.stored(payload, tensor)
            self._index.put(tensor, payload.interval, payload)
            step.stored(name, interval.length * tensor.element_size(), payload.encoding)
        elif payload.record is not None and not rule.linear:
            payload.record.site.closed = False
        view = stored_view(payload, tensor)
        if not attention:
            call.packed.append(view)
        return Handle(view, version_probe(tensor), tensor._version)

    def _by_recipe(self, tensor: Tensor, interval: Interval, need: Need, name: str, step: Step) -> Payload | None:
        """A payload without values of its own, where the tensor is a cheap function of tensors that are rounded."""
        if need is not Need.VALUES or interval.length < self.settings.options.smallest:
            return None
        recipe = self._recipes.find(tensor)
        if recipe is None or not self._may_run_again(recipe.roots):
            return None
        whole = Interval(0, tensor.untyped_storage().nbytes() // tensor.element_size(), True)
        return self._mark_recomputed(Payload(name, step, need, whole, RecomputedFunction(recipe, self._view)))

    def _recomputed_attention(self, tensor: Tensor, interval: Interval, call: Call) -> RecomputedAttention | None:
        """The encoding of a result of attention that is computed again from rounded arguments; None if it is not."""
        call.tensors.append(tensor)
        whole = self.settings.options.recompute and interval.dense and interval.start == 0
        encoding = self._attention.encoding(call, tensor) if whole else None
        if encoding is None and may_be_logsumexp(call, tensor):
            self.planner.ledger.raise_floor({view.item.site for view in call.packed}, FUSED_FLOOR)
        return encoding if encoding is not None and self._may_run_again(encoding.roots) else None

    def _may_run_again(self, roots: Sequence[Payload]) -> bool:
        """Whether a function of these payloads may be computed again: with given levels not where all are exact, since
        level 32 promises the gradient to the bit.
        """
        return self.settings.levels is None or any(root.lossy for root in roots)

    def _mark_recomputed(self, payload: Payload) -> Payload:
        """Note that a payload is computed from others. The errors of those others then have no closed form."""
        for root in payload.rounded:
            if root.record is not None:
                root.record.site.closed = False
        if payload.site in self.planner.ledger.sites:
            self.planner.ledger.sites[payload.site].recomputed = True
        return payload

    def _already_stored(self, tensor: Tensor, interval: Interval, need: Need) -> Payload | None:
        """A payload that stores the tensor already, and serves the same need."""

        def fits(payload: Payload) -> bool:
            if payload.layout is not None and payload.layout != (tensor.shape, tensor.stride()):
                return False
            if need in (Need.VALUES, Need.EXACT):
                return payload.need in (Need.VALUES, Need.EXACT) and (need is Need.VALUES or not payload.lossy)
            return payload.need is need and need is not Need.INSIDE

        return self._index.find(tensor, interval, fits)

    def _function_returned(self, call: Call, result: Any) -> None:
        """A function has returned: note how to compute its result again. In profiled steps, hook its gradient."""
        if isinstance(result, Tensor) and call.function in self._scope.watched:
            self._recipes.note(call, result)
        if self._step is None or not self._step.profiled:
            return
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        differentiable = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad and not o.is_leaf]
        if not differentiable:
            return
        for view in call.packed:
            payload = view.item
            rule = UNKNOWN if isinstance(payload.encoding, RecomputedFunction) else rule_of(call.function)
            for stored in payload.rounded:
                if stored.record is not None:
                    stored.record.watch(len(differentiable) == 1)
                    hook = gradient_hook(stored, view, rule, call, lambda: bool(self._reading))
                    differentiable[0].register_hook(hook)

    # --- backward

    def _unpack(self, packed: Packed) -> Tensor:
        if isinstance(packed, PassedThrough):
            if packed.version is not None and packed.tensor._version != packed.version:
                raise modified_error(packed.version, packed.tensor._version, packed.tensor.shape)
            return packed.tensor
        if isinstance(packed, ParameterCast):
            if packed.parameter._version != packed.version:
                raise modified_error(packed.version, packed.parameter._version, packed.shape)
            return packed.values()
        if packed.version_probe._version != packed.version:
            raise modified_error(packed.version, packed.version_probe._version, packed.view.shape)
        step = packed.view.item.step
        if not self._reading and torch._C._current_graph_task_id() != -1:  # else a user inspects a node's saved tensors
            if not step.begun:
                self._begin(step)
            elif step.over:
                self.planner.saw_second_backward(packed.view.item.rounded)
            note_compiled_reader(step, packed.view.item.site)
        return self._view(packed.view)

    def _view(self, view: StoredView) -> Tensor:
        """The tensor that a view describes, unpacked."""
        if (found := version_of(view.item)) != view.version:  # no handle has checked what a recipe reads
            raise modified_error(view.version, found, view.shape)
        values = self._values(view.item)
        if view.item.layout is not None:
            return with_gaps(values, view.item.layout, not view.item.lossy)
        return values.as_strided(view.shape, view.stride, int(values.storage_offset()) + view.offset)

    def _values(self, payload: Payload) -> Tensor:
        encoding = payload.encoding
        if self._reading == EXACT:
            encoding = payload.exact or encoding
        elif self._reading and payload.other is not None and family_of(payload.site) == self._reading:
            encoding = payload.other
        last = self._last
        if last is not None and last[0] is encoding:  # q, k and v ask for the same input, one after another
            return last[1]
        values = encoding.values()
        self._recorder.restored(payload.token, values)
        self._last = (encoding, values)
        return values

    def _backward(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Backward is called: run the extra backward passes of the step before it."""
        step = self._step
        if step is not None and not step.begun and step.wants_passes and self._can_pass:
            found = arguments_of_backward(args, kwargs)
            if found is not None:
                parameters = list(self._parameters().values())
                self._can_pass = can_run_twice(found[0], parameters) and step.run_passes(
                    *found, parameters, self._set_reading
                )
        try:
            return func(*args, **kwargs)
        except BaseException:
            self._abandon()
            raise

    def _set_reading(self, name: str) -> None:
        self._reading, self._last = name, None

    def _parameters(self) -> dict[str, Tensor]:
        plain = (Tensor, nn.Parameter)
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad and type(p) in plain}

    def _current_step(self) -> Step:
        """The step that is being stored; a new one if the backward of the last is over or failed."""
        self._last = None
        if self._step is not None and (self._step.begun or (self._index.empty and self._step.sites)):
            self._abandon()  # its backward failed, or its graph was dropped
        if self._step is None:
            self._step = self.planner.step(self.steps, self._can_pass)
            self._scope.restart()
        return self._step

    def _abandon(self) -> None:
        """Forget a step whose backward will not finish."""
        if self._step is not None:
            self._step.drop()
            self.planner.ledger.forget(self._step.sites, self._step.number)
        self._step, self._last = None, None
        self._recipes.clear()

    def _begin(self, step: Step) -> None:
        self._recipes.clear()
        step.begin(self._parameters() if self._hooks is not None else {})
        torch.autograd.Variable._execution_engine.queue_callback(lambda: self._finish(step))

    def _finish(self, step: Step) -> None:
        """Backward is over: learn from the step, and decide the levels of the next one."""
        self._last = None
        step.finish(self.planner.ledger)
        if step.audit is not None:
            self.audits.append((step.number, step.predicted, step.audit))
            if self.settings.error is not None and step.audit > self.settings.error:
                self.planner.ledger.invalidate()
        self.steps += 1
        self.latest = step
        if self._step is step:
            self._step = None
        if self.settings.bytes is not None:
            self._recorder.request() if step.number < RECORDED_STEP else self._recorder.finish()
        if step.profiled or step.audited or step.number == RECORDED_STEP:
            try:
                self.planner.decide(self._recorder.timeline)
            except BudgetError as refused:
                self._refused = refused
        self._refused = self._refused or self.planner.unseen_patterns(step)
        self._compiled.finished(step)
        if self._refused is not None:
            raise self._refused

    def save_profile(self, path: str | os.PathLike[str]) -> None:
        """Write the measured sensitivity of the model to a JSON file, for `compress_activations(profile=)`.

        Raises:
            CheckpointError: the file cannot be written.
        """
        save_profile(self.planner.ledger, self.model, path)

    def report(self) -> SavedReport:
        """What the latest finished step stored, and the gradient's error: predicted, and as audits measured it."""
        return report_of(self.latest, self.planner.ledger, self.audits, self.settings.error)
