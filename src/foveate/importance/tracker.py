"""ImportanceTracker: follows the importance of a live model's weights, and moves bits to where the task needs them.

    observed passes -> rolling importance -> a chain for the same bytes -> worth it? -> shadow run -> hand over

Everything that decides is a pure function of the other files of this folder. This file holds the state between passes.
A decision is taken after a pass has ended, on the thread that ran it, and published whole: no pass sees a part of it.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from foveate.allocate.constraints import Constraints
from foveate.allocate.plan import allocate
from foveate.collect.objectives import named
from foveate.errors import FloorError, FoveateError, PlaneNotResidentError
from foveate.formats.levels import TOP_LEVEL
from foveate.importance.chains import Rooms, chain_of, rooms_of, thresholds_chain_of
from foveate.importance.contribution import magnitude, start_contributions, update_contributions
from foveate.importance.moves import Held, Proposal, Ratios, chosen, proposal_of, propose
from foveate.importance.observe import Hook, Observer, Pace
from foveate.importance.options import TOKENS_OF_A_PASS, TrackingOptions
from foveate.importance.rolling import Seen, baseline, mean_ratios, ratios, rescaled, start, update
from foveate.importance.shadow import Sample, divergences, tokens_of
from foveate.importance.tags import TileTags, tags_of
from foveate.importance.tasks import Sharing, TaskProfile, means_for, start_shares, task_of, update_shares
from foveate.importance.verdict import Decision, Snapshot, Verdict
from foveate.nn.closing import Closing
from foveate.nn.levels import USER, apply, withdraw
from foveate.nn.registry import Registry, profile_of, quantized_part, registry_of
from foveate.precision.budgets import Budget
from foveate.precision.frontiers import Frontier
from foveate.precision.maps import PrecisionMap
from foveate.precision.state import LevelState

log = logging.getLogger("foveate")
_NUMBERS = itertools.count(1)
#: A refused move is not proposed again before twice as many tokens have passed as before the last one, up to this.
_LONGEST_WAIT = 64
_MOST_SNAPSHOTS = 512
#: The tracker of each model that is followed.
TRACKERS: WeakKeyDictionary[Registry, ImportanceTracker] = WeakKeyDictionary()


class ImportanceTracker(Closing):
    """Follows a stream, made by `track_importance`. It is a context manager; leaving it withdraws all that it decided.

    Attributes:
        name: the name of this decider, as in `foveate.state_of`.
        source: the candidate in force: `static`, `online`, or the name of a task.
        shares: the share of each candidate, where tasks are followed.
        history: moments of the stream (`foveate.importance.verdict.heat_map` draws them).
    """

    def __init__(
        self,
        model: nn.Module,
        budget: Budget | None,
        options: TrackingOptions,
        constraints: Constraints,
        tasks: Sequence[TaskProfile],
        warm_up: TaskProfile | None,
        on_decision: Callable[[Decision], None] | None,
    ) -> None:
        self.name = f"track_importance {next(_NUMBERS)}"
        self._model, self._registry, self._profile = quantized_part(model), registry_of(model), profile_of(model)
        self._budget, self._options, self._constraints = budget, options, constraints
        self._on_decision = on_decision
        self._sites = {site.name: site for site in self._profile.weight_sites()}
        means = {n: m for n, m in baseline(self._profile).items() if n in self._registry.weights}
        if not means:
            raise FoveateError("the profile has no input energies: quantize the original again")
        self._rolling = start(means if warm_up is None else {**means, **means_for(warm_up, means)}, options.warm_up)
        self._observer = Observer(self._model, self._registry, frozenset(means))
        self._sample = None if options.shadow is None else Sample(options.shadow.calls, options.shadow.tokens)
        self._ones: Ratios = {n: torch.ones(s.tiles, dtype=torch.float64) for n, s in self._sites.items()}
        self._contributions: dict[str, Tensor] | None = None
        self._magnitudes: dict[str, Tensor] = {}
        self._tasks = {task.name: ratios(self._profile, means_for(task, means)) for task in tasks}
        self.shares = start_shares(("static", "online", *self._tasks)) if tasks else {}
        self.source = "static"
        self.history: list[Snapshot] = []
        self._decisions: list[Decision] = []
        self._unobserved = self._new_tokens = self._shadow_tokens = self._decided_at = self._shadowed_at = 0
        self._quiet_until = self._refusals = self._inside = self._inside_pass = self._furthest = 0
        self._observing, self._pace = threading.Lock(), Pace(options.most_time)
        self._handed_over = self._suspended = False
        self._looked_at: LevelState | None = None
        self._base: Frontier | None = None
        if options.contribution:
            self._contributions = start_contributions(self._sites)
            weights = self._registry.weights
            for name, site in self._sites.items():
                value = weights[name].value
                whole = replace(value, active_levels=value.highest_levels[None])
                self._magnitudes[name] = magnitude(whole.dequantize(), site)
        self._take_base(self._state())
        self._hook = Hook(self._begin, self._end)
        self._handles = [
            self._model.register_forward_pre_hook(self._hook.before, with_kwargs=True),
            self._model.register_forward_hook(self._hook.after, always_call=True),
        ]

    # what the stream shows

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._inside == threading.get_ident():
            return
        state = self._registry.generations.state
        if state is not self._looked_at:  # looked at where it has changed, for this is a part of every pass
            self._looked_at, self._suspended = state, self._is_suspended()
            self._furthest = max(self._furthest, self._state().index)
        if self._suspended:
            return
        tokens = tokens_of(args, kwargs)
        self._new_tokens += tokens
        self._unobserved += max(1, tokens // TOKENS_OF_A_PASS)
        self._pace.begin()
        if self._unobserved < self._options.observe_every or not self._pace.allows:
            return
        if self._observing.acquire(blocking=False):
            self._unobserved = 0
            self._inside_pass = threading.get_ident()
            self._observer.begin()
            if self._sample is not None and not self._options.by_hand:
                self._sample.add(args, kwargs)

    def _end(self, is_whole: bool) -> None:
        if self._inside == threading.get_ident():
            return
        was_observed = self._inside_pass == threading.get_ident()
        self._pace.end(was_observed)
        if not was_observed:
            return
        try:
            seen = self._observer.end()
            if is_whole:
                self._see(seen)
                if not self._options.by_hand:
                    self._decide_if_due()
        finally:
            self._inside_pass = 0
            self._observing.release()

    def _decide_if_due(self) -> None:
        if not self.is_due or not self._handles:
            return
        self._decided_at = self._rolling.tokens
        self._inside = threading.get_ident()
        try:
            self._decide()
        finally:
            self._inside = 0

    def _see(self, seen: Mapping[str, Seen]) -> None:
        tokens, self._new_tokens = self._new_tokens, 0
        self._rolling = update(self._rolling, seen, self._options.decay, tokens)
        if self._contributions is not None:
            keep = self._options.decay.after(tokens)
            self._contributions = update_contributions(self._contributions, seen, self._magnitudes, self._sites, keep)

    # whose frontier is in force

    def _state(self) -> LevelState:
        state = self._registry.generations.state
        if state is None:
            raise FoveateError("the model has no levels yet: apply a map first")
        return state

    def _is_suspended(self) -> bool:
        """Whether another decider than the user has put its frontier over this one's, as a measurement does."""
        by = self._state().frontier_by
        return self._handed_over and by not in (self.name, USER)

    def _take_base(self, state: LevelState) -> None:
        """The frontier below this decider's is the source of the budgets; take it if it is another than before."""
        base = state.without(self.name).frontier
        if base is self._base:
            return
        self._base = base
        maps: list[PrecisionMap] = list(base)
        is_patent = self._options.contribution and self._budget is None
        if self._budget is not None:
            first = allocate(self._profile, self._budget, self._constraints)
            self._registry.check(first)
            maps = [first, *(plan for plan in maps if plan.bytes_resident < first.bytes_resident)]
        self._rooms: Rooms | None = None if is_patent else rooms_of(maps)
        if self._budget is None:
            self._static = Held(chain=base, ratios=self._ones)
        elif len(maps) == 1:
            self._static = Held(chain=Frontier(tuple(maps)), ratios=self._ones)
        else:
            self._static = Held(chain=self._chain(self._ones), ratios=self._ones)
        self._held = self._static
        self.source = "static"
        if is_patent:
            self._held = Held(chain=Frontier((self._profile.uniform(8),)), ratios=self._ones)
            self.source = "online"
        apply(self._model, self._held.chain, decider=self.name)
        self._handed_over = True

    # decisions

    def _chain(self, by: Ratios) -> Frontier:
        """The chain for ratios of importance; for the plain contribution, `by` is the importance itself."""
        stored = {name: self._registry.highest_of(name).clamp_max(TOP_LEVEL) for name in self._registry.weights}
        options, profile = self._options, self._profile
        if options.thresholds is not None:
            if not options.contribution:
                most = {name: site.bytes_of_planes() for name, site in self._sites.items()}
                by = {n: profile.losses[n][:, 0].double() * ratio / most[n] for n, ratio in by.items()}
            elif len(self._rolling.weights) < len(self._sites):  # what is not followed counts as the average
                average = torch.cat([by[name] for name in self._rolling.weights]).mean()
                by = {n: b if n in self._rolling.weights else average.expand(len(b)) for n, b in by.items()}
            return thresholds_chain_of(profile, self._rooms, self._constraints, options.thresholds, by, stored)
        assert self._rooms is not None
        return chain_of(rescaled(profile, by), self._rooms, self._constraints, stored)

    def _decide(self) -> None:
        state = self._state()
        if self._is_suspended():
            return
        self._take_base(state)
        now = ratios(self._profile, self._rolling.means())
        self._remember(now)
        # where bits were scarcest since the last decision, and half way: at both ends there may be nothing to move
        furthest = max(self._furthest, self._state().index)
        self._furthest, self._looked_at = 0, None
        tried = ((at, self._proposal(now, at)) for at in (furthest, furthest // 2))
        index, proposal = next((one for one in tried if one[1] is not None), (furthest, None))
        options, tokens = self._options.shadow, self._rolling.tokens
        due = options is not None and tokens - self._shadowed_at >= options.every
        if proposal is None and not due:
            return
        if self._sample is None or not len(self._sample):
            if proposal is not None and (self._sample is None or not self._options.by_hand):
                self._move("online", proposal, math.nan, math.nan)
            return
        self._check(proposal, now, index)

    def _proposal(self, now: Ratios, index: int) -> Proposal | None:
        if self._rolling.tokens < self._quiet_until:
            return None
        if self._contributions is not None:
            held = Held(chain=self._chain(self._contributions), ratios=now)
            found = proposal_of(self._profile, self._present(index), held, now, index)
            return found if found.moved.tiles else None
        return propose(self._profile, self._held, now, self._chain, index, self._options.caution)

    def _check(self, proposal: Proposal | None, now: Ratios, index: int) -> None:
        """Measure the candidates on the sample, and move to the best, or stay."""
        assert self._sample is not None
        self._shadowed_at = self._rolling.tokens
        candidates = {"static": self._static}
        if proposal is not None:
            candidates["online"] = proposal.held
        elif self.source == "online":
            candidates["online"] = self._held
        for name, task in self._tasks.items():
            candidates[name] = Held(chain=self._chain(task), ratios=task)
        maps = {name: held.chain[min(index, len(held.chain) - 1)] for name, held in candidates.items()}
        maps["held"] = self._present(index)
        calls = list(self._sample)
        found = divergences(self._model, self._registry, calls, maps, named(self._profile.objective))
        self._shadow_tokens += sum(call.tokens for call in calls) * (len(maps) + 1)
        if self._tasks:
            self.shares = update_shares(self.shares, found, Sharing())
            best = max(candidates, key=lambda name: self.shares[name])
            if found[best] > found["held"]:
                best = "held"
        else:
            best = chosen(found, self._options.caution.margin)
        if proposal is not None and best != "online":
            self._wait()
            self._record("online", False, proposal, found["held"], found["online"])
        is_new = best != self.source or (best == "online" and proposal is not None)
        if best != "held" and is_new:
            chosen_one = proposal if best == "online" and proposal is not None else None
            move = chosen_one or proposal_of(self._profile, maps["held"], candidates[best], now, index)
            self._move(best, move, found["held"], found[best])

    def _wait(self) -> None:
        self._refusals += 1
        longer = min(2**self._refusals, _LONGEST_WAIT)
        self._quiet_until = self._rolling.tokens + self._options.decide_every * longer

    def _move(self, source: str, proposal: Proposal, before: float, after: float) -> None:
        try:
            apply(self._model, proposal.held.chain, decider=self.name)
        except (FloorError, PlaneNotResidentError) as error:
            log.info("%s: a move was not possible: %s", self.name, error)
            self._wait()
            self._record(source, False, proposal, before, after)
            return
        self._held, self.source = proposal.held, source
        if source == "online":
            self._refusals = 0
        elif source == "static":
            self._wait()  # what was rolled back is not proposed again at once
        self._record(source, True, proposal, before, after)

    def _record(self, source: str, accepted: bool, proposal: Proposal, before: float, after: float) -> None:
        one = Decision(
            token=self._rolling.tokens,
            source=source,
            accepted=accepted,
            tiles=proposal.moved.tiles,
            bytes=proposal.moved.bytes,
            before=before,
            after=after,
            predicted_before=proposal.before,
            predicted_after=proposal.after,
        )
        self._decisions.append(one)
        log.info("%s: %s", self.name, one)
        if self._on_decision is not None:
            self._on_decision(one)

    def _present(self, index: int) -> PrecisionMap:
        return self._held.chain[min(index, len(self._held.chain) - 1)]

    def _remember(self, now: Ratios) -> None:
        plan = self._present(self._state().index)
        bits = {name: plan.mean_level(site) for name, site in self._sites.items()}
        one = Snapshot(token=self._rolling.tokens, bits=bits, importance=mean_ratios(self._profile, now))
        self.history.append(one)
        if len(self.history) > _MOST_SNAPSHOTS:
            del self.history[1::2]  # every second moment is kept

    # what a user asks for

    @property
    def is_due(self) -> bool:
        """Whether a decision is due: `decide_every` tokens have passed since the last one."""
        return self._rolling.tokens - self._decided_at >= self._options.decide_every

    def step(self) -> None:
        """Decide now, if it is due; call it between passes, on the thread that runs the model (`options.by_hand`)."""
        if self._handles and self.is_due:
            with self._observing:
                self._decide_if_due()

    def show(self, *args: Any, **kwargs: Any) -> None:
        """Keep a call of the model for shadow runs: one like the stream, that can be made again."""
        if self._sample is not None:
            self._sample.add(args, kwargs)

    @property
    def chain(self) -> Frontier:
        """The frontier that was handed over last."""
        return self._held.chain

    @property
    def verdict(self) -> Verdict:
        """What following came to so far."""
        return Verdict(
            tokens=self._rolling.tokens,
            decisions=tuple(self._decisions),
            shadow_tokens=self._shadow_tokens,
            refused_observations=self._rolling.refused,
        )

    def task(self, name: str) -> TaskProfile:
        """The importance of the stream so far, to be saved as the profile of a task.

        fv.save_task("code.safetensors", tracker.task("code"))
        """
        return task_of(name, self._rolling)

    def tags(self) -> dict[str, TileTags]:
        """The level and the importance of every tile, by the weights' names."""
        plan = self._registry.plan
        assert plan is not None
        return tags_of(plan, self._profile, ratios(self._profile, self._rolling.means()))

    def close(self) -> None:
        """End following, and leave the levels that would be in force without it."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hook.end()
        self._observer.end()  # a pass of another thread may be observed just now
        withdraw(self._model, self.name)
        self._handed_over = False
        TRACKERS.pop(self._registry, None)

    def __str__(self) -> str:
        return str(self.verdict)
