"""One linear layer of every library: its time beside ours, and beside the limit of the memory's bandwidth.

A set of equal layers far larger than the caches is multiplied with M rows of x, one layer after the other, so every
weight is read from memory. Each form of each library has a process of its own and takes its turn in every round, with
ours at every level. The machine's read bandwidth is measured in the same rounds.

`time_over_<form>_m<M>` is our time over theirs, at our level of as many bits, or at 8 bits where theirs has more. Below
1 ours is faster. `share_<form>` is bytes of weights over time over bandwidth, for one row. Libraries store different
bytes for the same bits; the rounds have the bytes of each product. Our inputs have 8 bits, as those of dynamic int8;
all others are exact.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.peers.child import SCRIPTS, Child, PeerError
from benchmarks.peers.environments import ENVIRONMENTS
from foveate.bench.limits.bandwidth import Blocks, fastest_loop
from foveate.bench.shared.random_model import on_random_planes
from foveate.bench.shared.result import Measured
from foveate.formats.levels import NESTED_LEVELS
from foveate.kernels.backends.table import ensure_loaded
from foveate.kernels.threads import threads
from foveate.memory.arena import arena
from foveate.nn.levels import apply
from foveate.nn.registry import registry_of
from foveate.precision.maps import uniform
from foveate.progress import track

#: The forms of `scripts/linear_layers.py`, by the environment that has them; None is this process's own environment.
FORMS: dict[str | None, tuple[str, ...]] = {
    None: ("torch float32", "torch bfloat16", "torch dynamic int8"),
    "torchao": ("torchao int8", "torchao dynamic int8", "torchao int4", "torchao dynamic int4"),
    "quanto": ("quanto qint8", "quanto qint4", "quanto qint2"),
    "hqq": ("hqq 8", "hqq 4", "hqq 3", "hqq 2"),
}

_FEW = 4  # layers per stack of `scripts/linear_layers.py`
_WARM_UP = 12


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        width: rows and columns of the layers.
        rows: rows of x.
        threads: the threads of every library.
        set_bytes: the smallest size of a set of weights, far larger than the last cache.
        rounds: interleaved rounds; figures are their medians. One more goes before, to warm up and compile.
        passes: passes over all layers in each turn, of which the median counts.
        many: rows of x from which only four layers are timed, since memory is no longer the limit.
    """

    width: int = 4096
    rows: tuple[int, ...] = (1, 16, 256)
    threads: int = 2
    set_bytes: int = 192 << 20
    rounds: int = 5
    passes: int = 3
    many: int = 256


class Ours:
    """Our layers on planes, at any level."""

    def __init__(self, sizes: Sizes) -> None:
        self.width = sizes.width
        count = max(2, -(-sizes.set_bytes * 8 // (min(NESTED_LEVELS) * sizes.width**2)))
        with torch.device("meta"):
            layers = nn.Sequential(*(nn.Linear(sizes.width, sizes.width, bias=False) for _ in range(count)))
        self.layers = layers
        registry = registry_of(on_random_planes(layers))
        self.maps = {level: uniform(registry.sites, level, input_level=8) for level in NESTED_LEVELS}
        self.count = count

    def bytes_each(self, level: int) -> int:
        """The bytes of planes and scales of a layer."""
        return self.maps[level].bytes_read // self.count

    def seconds(self, level: int, rows: int, set_bytes: int, passes: int) -> float:
        """Seconds per product: the mean over the layers that hold `set_bytes`, the median over passes."""
        apply(self.layers, self.maps[level])
        x_MK = torch.randn(rows, self.width, generator=torch.Generator().manual_seed(rows))
        used = list(self.layers)[: max(1, set_bytes // self.bytes_each(level))]
        seen = []
        with torch.inference_mode():
            for layer in used[-_WARM_UP:]:
                layer(x_MK)
            for _ in range(passes):
                started = time.perf_counter()
                for layer in used:
                    layer(x_MK)
                seen.append((time.perf_counter() - started) / len(used))
        return median(seen)


@dataclass(frozen=True)
class Peer:
    """A form of a library, loaded in its process.

    Attributes:
        form: its name in `scripts/linear_layers.py`.
        child: the process.
        about: its bits, bytes of a product, dtype, whether it is compiled, and version.
    """

    form: str
    child: Child
    about: Mapping[str, Any]

    def seconds(self, rows: int, few: bool, sizes: Sizes) -> float:
        """Seconds per product."""
        answer = self.child.ask("time", rows=rows, passes=sizes.passes, stacks=1 if few else None)
        return float(answer["seconds"])


def _start(form: str, environment: str | None, sizes: Sizes) -> Peer:
    python = ENVIRONMENTS[environment].python if environment else Path(sys.executable)
    child = Child(form, python, SCRIPTS / "linear_layers.py")
    try:
        about = child.ask("make", form=form, width=sizes.width, set_bytes=sizes.set_bytes, threads=sizes.threads)
        for rows in sizes.rows:
            child.ask("time", rows=rows, passes=1, stacks=1)
    except PeerError:
        child.close()
        raise
    return Peer(form, child, about)


def measure(sizes: Sizes | None = None, forms: Mapping[str | None, Sequence[str]] | None = None) -> Measured:
    """Measure ours, and every form whose environment exists. Notes say which are missing or why they failed.

    Args:
        sizes: how much is measured.
        forms: by environment, the forms to measure.
    """
    sizes, forms = sizes or Sizes(), FORMS if forms is None else forms
    ensure_loaded()
    notes: list[str] = []
    rounds: list[dict[str, Any]] = []
    with ExitStack() as stack, threads(sizes.threads):
        peers = []
        for environment, name in [(e, name) for e, names in forms.items() for name in names]:
            if environment and not ENVIRONMENTS[environment].built:
                notes.append(f"{name}: not measured, for there is no environment for it: `make bench-peers` makes it")
                continue
            try:
                peer = _start(name, environment, sizes)
            except PeerError as error:
                notes.append(f"{name}: not measured: {error}")
                continue
            stack.callback(peer.child.close)
            peers.append(peer)
        ours = Ours(sizes)
        memory = Blocks([arena([sizes.set_bytes])[0].fill_(1)])
        loop = fastest_loop(memory, rounds=3)
        for number in track(range(sizes.rounds + 1), "rounds"):
            turns = list(_round(ours, peers, sizes, lambda: median(memory.bandwidth(loop) for _ in range(3))))
            if number:
                rounds += [{"round": number, **turn} for turn in turns]
    notes += [f"{p.form}: {p.about['version']}, {p.about['dtype']}{', compiled' * p.about['compiled']}" for p in peers]
    return Measured(_figures(rounds), rounds, notes)


def _round(ours: Ours, peers: Sequence[Peer], sizes: Sizes, bandwidth: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """One round: every form once at every number of rows, with the bandwidth just before and just after."""
    for rows in sizes.rows:
        few = rows >= sizes.many
        turns: list[tuple[str, int, int, Callable[[], float]]] = []
        for level in NESTED_LEVELS:
            size = ours.bytes_each(level)
            part = _FEW * size if few else sizes.set_bytes
            turns.append((f"foveate {level}", level, size, partial(ours.seconds, level, rows, part, sizes.passes)))
        for peer in peers:
            turns.append((peer.form, peer.about["bits"], peer.about["bytes"], partial(peer.seconds, rows, few, sizes)))
        for form, bits, size, seconds in turns:
            before, took, after = bandwidth(), seconds(), bandwidth()
            speed = (before + after) / 2
            turn = {"form": form, "bits": bits, "bytes": size, "rows": rows, "seconds": took}
            yield turn | {"bandwidth": speed, "share": size / took / speed}


def _figures(rounds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    by_turn: dict[tuple[int, int, str], Mapping[str, Any]] = {(r["round"], r["rows"], r["form"]): r for r in rounds}
    ratios: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    for (number, rows, form), turn in by_turn.items():
        name = form.replace(" ", "_")
        if rows == 1:
            shares.setdefault(f"share_{name}", []).append(turn["share"])
        if not form.startswith("foveate"):
            own = by_turn[number, rows, f"foveate {min(turn['bits'], max(NESTED_LEVELS))}"]
            ratios.setdefault(f"time_over_{name}_m{rows}", []).append(own["seconds"] / turn["seconds"])
    return {name: median(values) for name, values in (*ratios.items(), *shares.items())}
