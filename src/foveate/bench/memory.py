"""Planes that come and go: memory that is given back, the limit, restoring, streaming, and conversions.

A Llama of random codes is saved once with every plane. A fresh process loads it within limits and measures itself: its
resident memory, and the time of what it does beside the time of plain reads of the same bytes, or of a plain copy.

The default is a model of 0.18 billion weights and half a minute of use. A larger one and ten minutes are arguments of
`measure`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from foveate.bench.fresh_process.run import run_in_fresh_process
from foveate.bench.load import write_model
from foveate.bench.shared.result import Measured
from foveate.formats.levels import PLANE_BITS
from foveate.kernels.backends.table import ensure_loaded
from foveate.memory import convert


def _seconds(run: Callable[[], object], times: int) -> float:
    found = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return median(found)


def conversions(megabytes: int = 64, times: int = 5) -> dict[str, float]:
    """For each conversion the bytes that it reads and writes a second, over those of a copy, in alternating rounds.

    Both write to memory that is resident, and the data are larger than caches.
    """
    ensure_loaded()
    generator = torch.Generator().manual_seed(0)
    size = megabytes << 20
    source = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
    target = torch.empty_like(source)
    rows = source.view(-1, 1024)
    halves = torch.randn(size // 2048, 1024, generator=generator).half()
    ranges = torch.ones(size // 64, 2, dtype=torch.bfloat16)
    half = torch.empty(size // 2, dtype=torch.uint8)
    planes = [torch.empty(halves.numel() * bits // 8, dtype=torch.uint8) for bits in PLANE_BITS]
    work: dict[str, tuple[Callable[[], object], float]] = {
        "planes_to_tile_order": (lambda: convert.tile_order(rows, 0, 128, target), 2 * size),
        "planes_of_1_bit_to_tile_order": (lambda: convert.tile_order(rows, 1, 128, target), 2 * size),
        "16_bits_to_planes": (lambda: convert.halves_to_planes(halves, 128, planes), halves.numel() * (2 + 1 + 0.125)),
        "cache_16_to_8": (lambda: convert.fewer_bits(source, ranges, 16, 8, half), 1.5 * size),
        "cache_8_to_4": (lambda: convert.fewer_bits(source, ranges, 8, 4, half), 1.5 * size),
        "cache_4_to_2": (lambda: convert.fewer_bits(source, ranges, 4, 2, half), 1.5 * size),
    }
    found = {}
    for name, (run, moved) in work.items():
        ratios = []
        for _ in range(times):
            copied = _seconds(lambda: target.copy_(source), 1)
            ratios.append((moved / _seconds(run, 1)) / (2 * size / copied))
        found[name] = median(ratios)
    return found


def measure(width: int = 1024, layers: int = 12, seconds: float = 20.0, rounds: int = 3) -> Measured:
    """Measure in a fresh process.

    Args:
        width, layers: of the model; a multiple of 64.
        seconds: how long maps and inputs change while the limit is watched.
        rounds: how often each thing that is timed is repeated; figures are medians.
    """
    ensure_loaded()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        write_model(path, width, layers)
        found: dict[str, Any] = run_in_fresh_process(
            "foveate.bench.fresh_process.memory", str(path), str(seconds), str(rounds)
        )
    converted = conversions()
    figures = {
        **found["figures"],
        "convert_ratio": min(converted.values()),
        **{f"convert_ratio_{name}": ratio for name, ratio in converted.items()},
    }
    notes = (
        f"a Llama of random codes, width {width}, {layers} layers; planes take {found['stored']} bytes at 8 bits, and "
        f"all that always stays {found['fixed']}",
        "memory_returned: resident memory of the process that it lost, over the bytes of the planes given up",
        f"limit_held: the highest resident memory of the process above what it had before loading, over the limit of "
        f"{found['limit']} bytes, during {seconds:g} s of calls with changing maps and inputs",
        "restoring_tokens_ratio: tokens a second while planes come back that are not read yet, over tokens at rest",
        "restore_ratio: seconds from 4 to 8 bits, over those of plain reads of the same bytes; restore_ms is the first",
        "disk_ratio: bytes a second of the mover, without checksums in disk_ratio_unverified, over plain reads of the "
        "same offsets and sizes by as many threads, in alternating rounds; both past the page cache",
        "streaming_ratio: seconds of a call that must read what is missing, over plain reads of those bytes; the limit "
        "is streaming_limit times what all planes take",
        "convert_ratio: the least of the conversions' bytes a second, over a copy's",
    )
    return Measured(figures, found["rounds"], notes)
