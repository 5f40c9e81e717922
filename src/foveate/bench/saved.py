"""The speed of packing and unpacking saved tensors, compared with reading the same memory and with torch's copies.

A set of equal float32 tensors far larger than the caches is packed, one tensor after the other. In every round each op
takes its turn, and so do a read of the same memory (`foveate.bench.limits.bandwidth`), a copy and a conversion to
bfloat16:

- `read_share_<op>`: the time of reading the tensors over the time of the op; 1 is the speed of the memory.
- `over_copy_<op>`: the time of the op over that of a float32 copy (`clone`), which also allocates its result.
- `over_bfloat16_<op>`: the same over a conversion to bfloat16, or back to float32 for ops that unpack.

The names end in the size of a tensor and the number of threads: `_16mb_t1`. A figure is the median of the ratios of all
rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from foveate.bench.limits.bandwidth import Blocks, Loop, fastest_loop
from foveate.bench.shared.result import BackgroundLoad, Measured
from foveate.kernels.backends.table import ensure_loaded
from foveate.kernels.threads import threads
from foveate.progress import track

BITS = (2, 4, 8)
MIB = 1 << 20


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        tensors: the sizes of the tensors in MiB.
        threads: the numbers of threads.
        group: the number of elements in a group.
        set_bytes: the bytes of all tensors of one size together.
        rounds: the number of interleaved rounds, of which the median is reported.
    """

    tensors: tuple[int, ...] = (1, 16)
    threads: tuple[int, ...] = (1, 2)
    group: int = 256
    set_bytes: int = 128 << 20
    rounds: int = 41


@dataclass(frozen=True)
class Turn:
    """One timed operation: a function that is called on each input; its results are freed at once."""

    call: Callable[..., Any]
    inputs: Sequence[tuple[Any, ...]]

    def seconds(self) -> float:
        """The time for all inputs, one after the other."""
        started = time.perf_counter()
        for each in self.inputs:
            self.call(*each)
        return time.perf_counter() - started


def _turns(xs: Sequence[Tensor], group: int) -> dict[str, Turn]:
    ops = torch.ops.foveate
    n = xs[0].numel()
    arguments = [(x,) for x in xs]
    halves = [(x.bfloat16(),) for x in xs]
    turns = {
        "copy": Turn(torch.clone, arguments),
        "bfloat16": Turn(Tensor.bfloat16, arguments),
        "from_bfloat16": Turn(Tensor.float, halves),
        "pack_nearest_b2": Turn(partial(ops.group_pack, bits=2, group=group, seed=None), arguments),
    }
    for bits in BITS:
        pack = partial(ops.group_pack, bits=bits, group=group, seed=7)
        unpack = partial(ops.group_unpack, bits=bits, group=group, n=n, dtype=torch.float32)
        turns[f"pack_b{bits}"] = Turn(pack, arguments)
        turns[f"unpack_b{bits}"] = Turn(unpack, [pack(x) for x in xs])
    turns["pack_b2_of_bfloat16"] = Turn(partial(ops.group_pack, bits=2, group=group, seed=7), halves)
    mask = partial(ops.mask_pack, threshold=0.0)
    values = torch.tensor([0.0, 2.0])
    turns["mask_pack"] = Turn(mask, arguments)
    turns["mask_unpack"] = Turn(partial(ops.mask_unpack, values=values, n=n), [(mask(x),) for x in xs])
    turns["variance_b2_b4_b8"] = Turn(partial(ops.group_variance, bits=BITS, group=group), arguments)
    return turns


def measure(sizes: Sizes | None = None) -> Measured:
    """Measure every size with every number of threads."""
    sizes = sizes or Sizes()
    ensure_loaded()
    base = torch.randn(sizes.set_bytes // 4, generator=torch.Generator().manual_seed(0))
    figures: dict[str, float] = {}
    rounds: list[dict[str, Any]] = []
    notes: list[str] = []
    with BackgroundLoad() as background, torch.inference_mode():
        for count in sizes.threads:
            for mib in sizes.tensors:
                with threads(count):
                    found, loop = _rounds(base, mib, sizes)
                name = f"{mib}mb_t{count}"
                figures |= {f"{key}_{name}": value for key, value in _figures(found).items()}
                rounds += [{"tensors": name, **r} for r in found]
                speed = median(sizes.set_bytes / r["read"] for r in found) / 1e9
                notes.append(f"{name}: memory is read at {speed:.1f} GB/s by {loop.streams} streams a thread")
    notes += [f"groups of {sizes.group}, float32, {sizes.set_bytes // MIB} MiB of tensors, cold", background.note()]
    return Measured(figures, rounds, notes)


def _rounds(base: Tensor, mib: int, sizes: Sizes) -> tuple[list[dict[str, float]], Loop]:
    turns = _turns(base.split(mib * MIB // 4), sizes.group)
    blocks = Blocks([base])
    loop = fastest_loop(blocks, min(9, sizes.rounds))

    def once() -> dict[str, float]:
        found = {name: turn.seconds() for name, turn in turns.items()}
        return found | {"read": sizes.set_bytes / blocks.bandwidth(loop)}

    once()  # not counted: pages, clocks and threads warm up
    return [once() for _ in track(range(sizes.rounds), f"saved tensors of {mib} MiB")], loop


def _figures(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    def over(name: str, other: str) -> float:
        return median(r[name] / r[other] for r in rounds)

    figures: dict[str, float] = {}
    for name in rounds[0]:
        if name in ("read", "copy", "from_bfloat16"):
            continue
        if "unpack" not in name and not name.endswith("of_bfloat16"):
            figures[f"read_share_{name}"] = over("read", name)
        figures[f"over_copy_{name}"] = over(name, "copy")
        if name != "bfloat16":
            figures[f"over_bfloat16_{name}"] = over(name, "from_bfloat16" if "unpack" in name else "bfloat16")
    return figures
