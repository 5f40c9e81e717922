"""Registry: which sites a quantized model has, where each stands in its generations, and what its planes allow.

The levels of all tiles of a generation lie side by side, and so do those of all inputs. So publishing a map is one
check and one copy, however many layers the model has (`foveate.nn.generations`). The check compares the map with the
*stored* levels: a level can only be active where its planes were loaded and kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from foveate.errors import FoveateError, PlaneNotResidentError, SiteError, StateError
from foveate.kernels.backends.table import ensure_loaded
from foveate.nn.foreign.pretrained import allow_saving, refuse_saving
from foveate.nn.fused_group import CallScope, FusedGroup, fused_groups, unhook
from foveate.nn.generations import Generations
from foveate.nn.modules import PlaneLinear
from foveate.nn.passes import Passes
from foveate.nn.plane_module import PlaneModule
from foveate.nn.states import weight_in
from foveate.nn.weight import PlaneWeight
from foveate.planes import rounded_up, share_active_levels, shortfall
from foveate.precision.frontiers import Frontier
from foveate.precision.maps import Levels, PrecisionMap, Site, tile_levels
from foveate.precision.profiles import Profile
from foveate.precision.state import Composed, LevelState

_ATTRIBUTE = "_foveate"


@dataclass(frozen=True, kw_only=True, eq=False)
class Hooks:
    """The objects whose methods are hooks on a quantized model.

    Attributes:
        passes: where the passes of the model begin and end.
        scopes: of the modules that contain fused groups, by their names.
    """

    passes: Passes
    scopes: Mapping[str, CallScope]


class Registry:
    """The sites of one model, in order, and its generations of levels.

    Attributes:
        sites: weights and inputs.
        weights: the weight on planes of each weight site, by the site's name.
        inputs: for each input site the module whose `input_level` holds its level.
        other_bytes: bytes of everything that is not a site.
        other_parameters: how many parameters are not at a site, by the class of their module.
        profile_source: reads the profile of this model, if one was kept; None if not.
        generations: the state of the levels, and what publishes it.
    """

    def __init__(
        self,
        sites: Iterable[Site],
        weights: Mapping[str, PlaneWeight],
        inputs: Mapping[str, PlaneModule],
        hooks: Hooks,
        other_bytes: int,
        other_parameters: Mapping[str, int],
    ) -> None:
        self.sites = tuple(sites)
        self.weights = dict(weights)
        self.inputs = dict(inputs)
        self.other_bytes = other_bytes
        self.other_parameters = other_parameters
        self.profile_source: Callable[[], Profile] | None = None
        self._profile: Profile | None = None
        self._hooks = hooks
        self._bind()

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "generations"}
        return {**state, "_state": self.generations.state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # plain pickle copies views one by one, and a process that unpickles may not have loaded its kernels yet
        levels = state.pop("_state")
        self.__dict__.update(state)
        ensure_loaded()
        self._bind()
        if levels is not None:
            self._put(lambda _: levels)

    def _bind(self) -> None:
        """Put the levels that modules show side by side, give each site its place, and form the fused groups."""
        self._known_sites = self.sites
        passes = self._hooks.passes
        values = share_active_levels([w.value for w in self.weights.values()])
        for place, (weight, value) in enumerate(zip(self.weights.values(), values, strict=True)):
            weight.set(value)
            weight.users.add(self)
            weight.passes, weight.place = passes, place
        self.renew()
        modules = self.inputs.values()
        levels = torch.cat([m.input_level for m in modules]) if self.inputs else torch.empty(0, dtype=torch.uint8)
        ranges = torch.cat([m.input_range for m in modules]) if self.inputs else torch.empty(0)
        for i, module in enumerate(modules):
            module.input_level, module.input_range = levels[i : i + 1], ranges[2 * i : 2 * i + 2]
            module.input_place = i
        tiles = [v.stored_levels.numel() for v in values]
        active = _block([v.active_levels for v in values])
        self.generations = Generations(passes, tiles, tuple(self.inputs), (active, levels, ranges))
        linears = linear_layers(self.inputs)
        for layer in linears.values():
            layer.reset_calls()
        for container, layers in fused_groups(linears):
            own_calls = [layer.own_call for layer in layers]
            fused_group = FusedGroup(layers, own_calls, self._hooks.scopes[container], self.generations.now)
            for position, layer in enumerate(layers):
                layer.fused_group, layer.position = fused_group, position

    def renew(self) -> None:
        """Take the stored levels that the weights have now, after one of them was replaced."""
        self._take([w.value.stored_levels for w in self.weights.values()])

    def _take(self, stored: Sequence[Tensor]) -> None:
        """Take stored levels, one tensor a weight, and the exact tiles that the weights have now."""
        self._stored = _joined(stored)
        exact = [w.value.exact for w in self.weights.values()]
        self._exact: Tensor | None = None
        if any(exact):
            both = zip(exact, stored, strict=True)
            self._exact = _joined([one.levels() if one else torch.zeros_like(s) for one, s in both])

    @property
    def profile(self) -> Profile | None:
        """The profile of this model, read from its folder when first asked for; None if none was kept."""
        if self._profile is None and self.profile_source is not None:
            self._profile = self.profile_source()
        return self._profile

    @profile.setter
    def profile(self, profile: Profile) -> None:
        self._profile = profile

    def check(self, plan: PrecisionMap) -> None:
        """Raise unless the map is of this model and the planes that it reads are stored.

        Raises:
            SiteError: it is not a map, or a map of another model.
            PlaneNotResidentError: planes that it reads were not loaded or not kept.
        """
        if not isinstance(plan, PrecisionMap):
            raise SiteError(f"{plan!r} is not a PrecisionMap; profile.uniform(4) is one")
        if plan.sites is not self._known_sites:
            self._check_sites(plan)
        shortfall = self._first_shortfall(plan)
        if shortfall:
            raise PlaneNotResidentError(
                f"{shortfall}; load the model with the planes of this map (`foveate.load(..., keep=map)`)"
            )

    def _levels_read(self, composed: Composed, levels: Tensor) -> Tensor:
        """The levels at which tiles are read where maps say `levels`, uint8 [maps, tiles]: between what its planes give
        and its exact level, an exact tile is read exactly. Raises unless the maps are of this model and what they read
        is stored.
        """
        for plan in composed.maps:
            if plan.sites is not self._known_sites:
                self._check_sites(plan)
        if self._exact is not None:
            levels = rounded_up(levels, self._stored, self._exact)
        beyond = levels > self._stored
        if bool((beyond if self._exact is None else beyond & (levels != self._exact)).any()):
            for plan in composed.maps:
                self.check(plan)
        return levels

    def apply(self, plan: PrecisionMap | Frontier, decider: str = "user") -> None:
        """Put a map, or a chain of maps, in force; errors as for `check`.

        The map in force stands for the map of the frontier that it was raised from.
        """
        if not isinstance(plan, (PrecisionMap, Frontier)):
            raise SiteError(f"{plan!r} is not a PrecisionMap; profile.uniform(4) is one")
        state, composed = self.generations.state, self.generations.composed
        if state is not None and composed is not None and plan is composed.plan:
            plan = state.frontier[state.ends[0][1]]  # what is in force, but for raises
        frontier = Frontier((plan,)) if isinstance(plan, PrecisionMap) else plan

        def changed(now: LevelState | None) -> LevelState:
            return now.with_frontier(decider, frontier) if now else LevelState(frontiers={decider: frontier})

        self._put(changed)

    def change(self, changed: Callable[[LevelState], LevelState]) -> LevelState:
        """Put a changed state of the levels in force, and return it; errors as for `apply`."""

        def of_present(now: LevelState | None) -> LevelState:
            if now is None:
                raise FoveateError("the model has no levels yet: apply a map first")
            return changed(now)

        return self._put(of_present)

    def _put(self, changed: Callable[[LevelState | None], LevelState]) -> LevelState:
        return self.generations.change(changed, self._levels_read)

    def highest_of(self, name: str) -> Tensor:
        """The highest level at which maps may read each tile of a weight, uint8 [NT, G]."""
        return self.weights[name].value.highest_levels

    @property
    def version(self) -> int:
        """A number that changes when planes come or go; always 0 where all are in memory."""
        return 0

    def as_read(self, plan: PrecisionMap) -> PrecisionMap:
        """A map at the levels that are in memory."""
        return plan

    @property
    def wanted(self) -> PrecisionMap | None:
        """The map that was decided for rows for which nothing was asked; None before any was applied."""
        composed = self.generations.composed
        return None if composed is None else composed.plan

    @property
    def plan(self) -> PrecisionMap | None:
        """The map that is read: `wanted`, unless planes are not in memory, or exact tiles have no planes."""
        wanted = self.wanted
        if wanted is None or self._exact is None:
            return wanted
        levels: dict[str, Levels] = dict(wanted.levels)
        for name, weight in self.weights.items():
            stored, exact = weight.value.stored_levels, weight.value.exact
            if exact is not None:
                tiles = rounded_up(tiles_of(wanted, name, stored), stored, exact.levels())
                levels[name] = bytes(tiles.view(-1).tolist())
        read = replace(wanted, levels=levels)
        return wanted if read == wanted else replace(read, predicted_loss=math.nan)

    @property
    def ranges(self) -> Mapping[str, tuple[float, float]]:
        """The input sites whose rows share one scale, and the range of each, unless ranges are suspended."""
        composed = self.generations.composed
        return {} if composed is None else composed.ranges

    def set_ranges(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        """Give the inputs named one scale for all rows, and all others a scale for each."""
        unknown = set(ranges) - set(self.inputs)
        if unknown:
            raise SiteError(f"ranges name inputs that the model does not have: {', '.join(sorted(unknown)[:5])}")
        self.change(lambda now: now.with_ranges(ranges))

    def _check_sites(self, plan: PrecisionMap) -> None:
        if plan.sites != self.sites:
            odd = {s.name for s in plan.sites} ^ {s.name for s in self.sites}
            what = f"they differ in {', '.join(sorted(odd)[:3])}" if odd else "shapes or groups differ"
            raise SiteError(f"the map is of another model: {what}")
        self._known_sites = plan.sites

    def _first_shortfall(self, plan: PrecisionMap) -> str | None:
        """The first weight of which a map reads more than is stored, in words; None if there is none."""
        for name, weight in self.weights.items():
            stored, exact = weight.value.stored_levels, weight.value.exact
            short = shortfall(tiles_of(plan, name, stored), stored, exact.levels() if exact else None)
            if short is not None:
                return f"{name} at level {short[0]}: some of its tiles are stored up to {short[1]} bits only"
        return None


def tiles_of(plan: PrecisionMap, name: str, like: Tensor) -> Tensor:
    """The levels of a weight in a map, in the shape of its tiles."""
    return torch.frombuffer(bytearray(tile_levels(plan.levels[name], like.numel())), dtype=torch.uint8).view_as(like)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts]) if parts else torch.empty(0, dtype=torch.uint8)


def linear_layers(inputs: Mapping[str, PlaneModule]) -> dict[str, PlaneLinear]:
    """The linear layers of input sites, by the names that fused groups are found by. A layer inside an adapter goes by
    the adapter's name, for it shares its input as before.
    """
    return {
        site.removesuffix(":input").removesuffix(".base_layer"): module
        for site, module in inputs.items()
        if isinstance(module, PlaneLinear)
    }


def _block(parts: list[Tensor]) -> Tensor:
    """The block that consecutive views were cut from (`foveate.planes.share_active_levels`), as one view."""
    if not parts:
        return torch.empty(0, dtype=torch.uint8)
    ends = [p.data_ptr() + p.numel() for p in parts]
    assert all(p.data_ptr() == end for p, end in zip(parts[1:], ends, strict=False))
    return torch.as_strided(parts[0], (sum(p.numel() for p in parts),), (1,), parts[0].storage_offset())


def quantized_part(model: nn.Module) -> nn.Module:
    """The module that was quantized: `model`, or the one inside a wrapper; raises `FoveateError` if there is none."""
    if _ATTRIBUTE in model.__dict__:
        return model
    inner = [m for m in model.modules() if _ATTRIBUTE in m.__dict__]
    if len(inner) != 1:
        raise FoveateError(
            "several quantized models inside one"
            if inner
            else "the model is not quantized: call foveate.quantize or foveate.load first"
        )
    return inner[0]


def attach(model: nn.Module, registry: Registry) -> None:
    """Make `model` a quantized model."""
    model.__dict__[_ATTRIBUTE] = registry
    refuse_saving(model)
    model.register_load_state_dict_pre_hook(_refuse_what_does_not_fit)


def detach(model: nn.Module) -> None:
    """Make `model` an ordinary model again, once it holds no planes; undoes `attach` and `hooked_scopes`."""
    model.__dict__.pop(_ATTRIBUTE, None)
    allow_saving(model)
    unhook(model)
    hooks = model._load_state_dict_pre_hooks
    for number, hook in list(hooks.items()):
        if getattr(hook, "hook", hook) is _refuse_what_does_not_fit:
            del hooks[number]


def _refuse_what_does_not_fit(model: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """A pre-hook of `load_state_dict`: raises `StateError` before anything is loaded if any weight does not fit."""
    errors = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PlaneWeight):
            try:
                weight_in(state, f"{prefix}{name}.", module.value)
            except StateError as error:
                errors.append(str(error))
    if errors:
        more = f" ({len(errors) - 1} other weights do not fit either)" if len(errors) > 1 else ""
        raise StateError(f"nothing of the state was loaded: {errors[0]}{more}")


def registry_of(model: nn.Module) -> Registry:
    """The registry of a quantized model, or of the one inside a wrapper; raises `FoveateError` if there is none."""
    return cast(Registry, quantized_part(model).__dict__[_ATTRIBUTE])


def profile_of(model: nn.Module) -> Profile:
    """The profile of a quantized model; raises `FoveateError` if the model was loaded without one."""
    profile = registry_of(model).profile
    if profile is None:
        raise FoveateError("the model was loaded without its profile")
    return profile
