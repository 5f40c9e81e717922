"""The cost of changing the precision of every layer of a model while it runs.

It checks properties of the stored form. A switch is fast, since it writes one byte for each tile. It moves no planes. A
model that is switched to level b has the same outputs, bit for bit, as a model that was loaded at level b. And a pass
reads one map from beginning to end, while another thread switches the model and two threads call it.
"""

from __future__ import annotations

import ctypes
import hashlib
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from foveate.bench.shared.result import Measured
from foveate.calibrate.quantize import quantize
from foveate.collect.objectives import Embedding
from foveate.folder.load import load
from foveate.folder.save import save
from foveate.formats.levels import NESTED_LEVELS
from foveate.nn.levels import apply
from foveate.nn.registry import Registry, registry_of
from foveate.precision.maps import PrecisionMap
from foveate.precision.profiles import Profile


def _layers(count: int, width: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width, bias=i % 2 == 0) for i in range(count)))


def _maps(profile: Profile, count: int, generator: torch.Generator) -> list[PrecisionMap]:
    """Maps with a random level for each tile, all different; inputs have 8 or 16 bits."""
    choices = torch.tensor(NESTED_LEVELS, dtype=torch.uint8)
    maps = []
    for _ in range(count):
        levels: dict[str, int | bytes] = {}
        for site in profile.sites:
            if site.kind == "input":
                levels[site.name] = int(torch.randint(0, 2, (), generator=generator)) * 8 + 8
            else:
                levels[site.name] = bytes(choices[torch.randint(0, 5, (site.tiles,), generator=generator)].tolist())
        maps.append(PrecisionMap(profile.sites, levels, profile.other_bytes))
    return maps


def _planes(registry: Registry) -> list[tuple[str, Tensor]]:
    return [
        (f"{name}, plane {p}", plane)
        for name, weight in registry.weights.items()
        for p, plane in enumerate((*weight.value.planes, weight.value.scales))
    ]


def _state(planes: Sequence[tuple[str, Tensor]]) -> dict[str, tuple[int, bytes]]:
    """The address of each plane, and the SHA-256 of its contents."""
    state = {}
    for name, tensor in planes:
        size = tensor.numel() * tensor.element_size()
        content = (ctypes.c_char * size).from_address(tensor.data_ptr())
        state[name] = (tensor.data_ptr(), hashlib.sha256(content).digest())
    return state


def _identical_levels(model: nn.Module, profile: Profile, layers: int, width: int, x_BK: Tensor) -> dict[int, bool]:
    """For each level, whether the live model's outputs are those of the model loaded with that level's planes only."""
    same = {}
    with tempfile.TemporaryDirectory() as folder:
        for level in NESTED_LEVELS:
            path = Path(folder) / f"b{level}"
            plan = profile.uniform(level)
            save(model, path, keep=plan)
            with torch.device("meta"):
                skeleton = _layers(layers, width)
            loaded = load(path, keep=level, model=skeleton)
            apply(model, plan)
            same[level] = bool(torch.equal(model(x_BK), loaded(x_BK)))
    return same


@dataclass
class _Passes:
    """What threads saw while another one switched the model."""

    passes: int = 0
    torn: int = 0
    lag: int = 0


def _torn_passes(
    model: nn.Module, maps: Sequence[PrecisionMap], x_BK: Tensor, switches: int, compiled: bool
) -> _Passes:
    """Switch a model in one thread while two call it, one of them with a backward pass; count passes that are torn.

    A pass is torn if its outputs and gradients are those of no map. Its lag is how many passes after the end of a
    switch still read an older map.
    """
    call = torch.compile(model, backend="aot_eager") if compiled else model

    def outputs(gradient: bool) -> Tensor:
        with torch.set_grad_enabled(gradient):
            given = x_BK.clone().requires_grad_(gradient)
            y: Tensor = call(given)
            if not gradient:
                return y
            y.sum().backward()
            assert given.grad is not None
            return torch.cat([y.detach(), given.grad])

    wanted: dict[bool, list[Tensor]] = {}
    for gradient in (False, True):
        wanted[gradient] = []
        for plan in maps:
            apply(model, plan)
            wanted[gradient].append(outputs(gradient))
    done, published, total = threading.Event(), [0], _Passes()
    lock = threading.Lock()

    def run(gradient: bool) -> None:
        late = 0
        while not done.is_set():
            before = published[0]
            y = outputs(gradient)
            after = published[0]
            seen = [number for number, one in enumerate(wanted[gradient]) if torch.equal(y, one)]
            allowed = {number % len(maps) for number in range(before, min(after + 1, before + len(maps)) + 1)}
            late = late + 1 if seen and not set(seen) & allowed else 0
            with lock:
                total.passes += 1
                total.torn += not seen
                total.lag = max(total.lag, late)

    apply(model, maps[0])
    threads = [threading.Thread(target=run, args=(gradient,)) for gradient in (False, True)]
    for thread in threads:
        thread.start()
    for number in range(1, switches + 1):
        apply(model, maps[number % len(maps)])
        published[0] = number
    done.set()
    for thread in threads:
        thread.join()
    return total


def _begin_us(model: nn.Module) -> float:
    """The time that the beginning and the end of a pass take, in microseconds."""
    passes = registry_of(model).generations.passes
    rounds = []
    for _ in range(7):
        started = time.perf_counter()
        for _ in range(1000):
            passes.begin(model, (), {})
            passes.end(model, (), None)
        rounds.append((time.perf_counter() - started) * 1e3)
    return median(rounds)


def measure(layers: int = 150, width: int = 512, switches: int = 400) -> Measured:
    """Switch a model of linear layers through new maps, and compare it with the same model loaded at each level.

    Args:
        layers: the number of layers.
        width: the inputs and the outputs of each layer.
        switches: the number of switches that are timed.
    """
    generator = torch.Generator().manual_seed(0)
    model = _layers(layers, width).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / width**0.5)
    profile = quantize(model, [torch.randn(2, width, generator=generator)], objective=Embedding(), progress=False)
    maps = _maps(profile, switches, generator)
    planes = _planes(registry_of(model))
    before = _state(planes)
    x_BK = torch.randn(3, width, generator=generator)
    rounds: list[dict[str, Any]] = []
    with torch.inference_mode():
        model(x_BK)
        for number, plan in enumerate(maps):
            started = time.perf_counter()
            apply(model, plan)
            rounds.append({"switch": number, "microseconds": (time.perf_counter() - started) * 1e6})
            if number % 16 == 0:
                model(x_BK)  # the model runs between switches, which evicts the registry from the caches
        after = _state(_planes(registry_of(model)))
        moved = sum(t.numel() * t.element_size() for name, t in planes if before[name] != after.get(name))
        same = _identical_levels(model, profile, layers, width, x_BK)
    small = _layers(6, 64).eval()
    its_profile = quantize(small, [torch.randn(8, 64, generator=generator)], objective=Embedding(), progress=False)
    its_maps = [its_profile.uniform(level, 8) for level in NESTED_LEVELS]
    x_small = torch.randn(2, 64, generator=generator)
    eager, compiled = (_torn_passes(small, its_maps, x_small, 5_000, how) for how in (False, True))
    ordered = sorted(r["microseconds"] for r in rounds)
    figures = {
        "switch_us_p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "switch_us_median": median(ordered),
        "switch_us_worst": ordered[-1],
        "bytes_moved": moved,
        "outputs_identical": float(all(same.values())),
        "torn_passes": eager.torn + compiled.torn,
        "switch_lag_passes": max(eager.lag, compiled.lag),
        "begin_pass_us": _begin_us(model),
    }
    tiles = sum(s.tiles for s in profile.weight_sites())
    notes = (
        f"{layers} layers of {width} x {width}, {tiles} tiles; each switch is to a map that was never in force before",
        f"bytes_moved: planes and scales ({sum(t.numel() * t.element_size() for _, t in planes)} bytes) compared by "
        "address and SHA-256 before the first switch and after the last",
        f"torn_passes: of {eager.passes} eager and {compiled.passes} compiled passes of two threads, of which one runs "
        "backward, during 10000 switches; switch_lag_passes: passes after a switch that read an older map",
        f"outputs_identical: {', '.join(f'{b} bits {s}' for b, s in same.items())}".lower(),
    )
    return Measured(figures, rounds, notes)
