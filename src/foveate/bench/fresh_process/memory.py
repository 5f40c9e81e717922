"""A model within limits in a fresh process, which measures its own memory and its reads.

python -m foveate.bench.fresh_process.memory FOLDER SECONDS ROUNDS
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import nn

import foveate
from foveate.bench.fresh_process.run import peak_memory, reset_peak_memory
from foveate.bench.shared.extras import require
from foveate.errors import BudgetError
from foveate.kernels.backends.table import ensure_loaded
from foveate.memory.held import Held
from foveate.memory.mover import Mover
from foveate.nn.residency.attach import resident_registry
from foveate.nn.residency.registry import ResidentRegistry
from foveate.precision.maps import PrecisionMap, uniform

_THREADS = 2  # as the mover has


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


class Bench:
    """A model, the runs of its planes, and what was measured of it."""

    def __init__(self, folder: Path, rounds: int) -> None:
        self.folder, self.times = folder, rounds
        self.rounds: list[dict[str, Any]] = []

    def load(self, memory: int, *, strict: bool = False) -> None:
        """Load the model within a limit."""
        self.model: nn.Module = foveate.load(self.folder, memory=memory, strict=strict)
        self.registry: ResidentRegistry = resident_registry(self.model)
        self.held: Held = self.registry.residency.held

    def at(self, level: int) -> PrecisionMap:
        """The map with all weights at one level, and inputs of 8 bits."""
        head = foveate.read_head(self.folder)
        return replace(uniform(head.sites, level, head.other_bytes, 8), other_parameters=head.other_parameters)

    def note(self, what: str, **values: float) -> None:
        """Keep a row of raw data."""
        self.rounds.append({"what": what, **values})

    def middle(self, what: str, key: str) -> float:
        """The median of a row's values."""
        return float(median(r[key] for r in self.rounds if r["what"] == what))

    def token(self, x: torch.Tensor) -> float:
        """The seconds of a call."""
        started = time.perf_counter()
        with torch.inference_mode():
            self.model(x, use_cache=False)
        return time.perf_counter() - started

    def idle(self) -> None:
        """Wait until nothing is on its way any more."""
        self.registry.residency.settle()
        while foveate.memory_report(self.model).waiting:
            time.sleep(0.001)

    def plain_reads(self, numbers: Sequence[int]) -> float:
        """The seconds of plain reads of runs by as many threads as the mover has, each into a page of its own."""
        held, descriptors = self.held, {}
        for plane, place in held.places.items():
            name = str(getattr(place, "name", ""))
            descriptors[plane] = os.open(name, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        queue = list(reversed(numbers))
        most = max((held.layout.slots[n].pages for n in numbers), default=mmap.PAGESIZE)

        def work() -> None:
            buffer = memoryview(mmap.mmap(-1, most))
            while queue:
                try:
                    number = queue.pop()
                except IndexError:
                    return
                run, slot = held.runs[number], held.layout.slots[number]
                os.preadv(descriptors[run.plane], [buffer[: slot.pages]], run.offset - slot.lead)

        threads = [threading.Thread(target=work) for _ in range(_THREADS)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - started
        for descriptor in descriptors.values():
            os.close(descriptor)
        return seconds


def _returned(bench: Bench) -> dict[str, float]:
    """Memory that is given back from 8 bits to the least possible, and the time of that."""
    least = bench.registry.residency.least
    for _ in range(bench.times):
        foveate.resize(bench.model, memory=1 << 50)
        bench.idle()
        bench.token(torch.tensor([[1]]))
        gc.collect()
        before, planes = _resident(), foveate.memory_report(bench.model).resident
        started = time.perf_counter()
        foveate.resize(bench.model, memory=least)
        seconds = time.perf_counter() - started
        given = planes - foveate.memory_report(bench.model).resident
        bench.note("returned", ratio=(before - _resident()) / given, milliseconds=1e3 * seconds)
    return {
        "memory_returned": bench.middle("returned", "ratio"),
        "return_ms": bench.middle("returned", "milliseconds"),
    }


def _restored(bench: Bench) -> dict[str, float]:
    """From 4 to 8 bits: its time beside that of plain reads, and how fast calls are meanwhile."""
    four, eight = bench.at(4), bench.at(8)
    x = torch.tensor([[1, 2, 3]])
    for _ in range(bench.times):
        foveate.resize(bench.model, memory=four.bytes_resident)
        runs = [n for n, run in enumerate(bench.held.runs) if n not in bench.registry.residency.resident()]
        plain = bench.plain_reads(runs)
        time.sleep(0.5)
        started = time.perf_counter()
        foveate.resize(bench.model, memory=1 << 50)
        bench.idle()
        seconds = time.perf_counter() - started
        bench.note("restored", milliseconds=1e3 * seconds, plain=1e3 * plain, ratio=seconds / plain)
        # the map stays at 4 bits: what is compared is only what the mover takes from calls
        foveate.resize(bench.model, memory=four.bytes_resident)
        foveate.apply(bench.model, four)
        rest = [bench.token(x) for _ in range(12)][4:]
        foveate.resize(bench.model, memory=1 << 50)
        during = []
        while foveate.memory_report(bench.model).waiting:
            during.append(bench.token(x))
        if len(during) > 2:
            bench.note("tokens", ratio=median(rest) / median(during[1:-1]), tokens=len(during))
        foveate.apply(bench.model, eight)
    figures = {
        "restore_ms": bench.middle("restored", "milliseconds"),
        "restore_ratio": bench.middle("restored", "ratio"),
    }
    if any(row["what"] == "tokens" for row in bench.rounds):  # a small model is back before three calls are over
        figures["restoring_tokens_ratio"] = bench.middle("tokens", "ratio")
    return figures


def _disk(bench: Bench) -> dict[str, float]:
    """The mover's bytes a second over those of plain reads."""
    held, runs = bench.held, [n for n, run in enumerate(bench.held.runs) if run.plane > 2]
    for _ in range(bench.times):
        plain = bench.plain_reads(runs)
        seconds = {}
        for verified in (True, False):
            foveate.resize(bench.model, memory=bench.registry.residency.least)
            transfer = held.transfer if verified else _unverified(held)
            held.reservation.coming([held.layout.slots[n] for n in runs])
            mover = Mover(transfer, lambda number, error: None, threads=_THREADS)
            started = time.perf_counter()
            mover.request({n: (float(n),) for n in runs})
            mover.wait(runs)
            seconds[verified] = time.perf_counter() - started
            mover.stop()
            mover.join()
            held.reservation.give_back([held.layout.slots[n] for n in runs])
        bench.note("disk", verified=plain / seconds[True], unverified=plain / seconds[False], plain=1e3 * plain)
    return {
        "disk_ratio": bench.middle("disk", "verified"),
        "disk_ratio_unverified": bench.middle("disk", "unverified"),
    }


def _unverified(held: Held) -> Any:
    def transfer(number: int) -> int:
        run, slot = held.runs[number], held.layout.slots[number]
        held.places[run.plane].transfer(run, held.reservation.slot(slot), slot.lead)  # type: ignore[attr-defined]
        return run.size

    return transfer


def _streamed(bench: Bench) -> dict[str, float]:
    """A call at 8 bits in half of the memory of 8 bits, or in more if a layer needs that, beside plain reads."""
    eight = bench.at(8)
    x = torch.tensor([[1]])
    for share in (0.5, 0.7, 0.9):
        bench.load(max(int(share * eight.bytes_resident), bench.registry.residency.least), strict=True)
        foveate.apply(bench.model, eight)
        try:
            bench.token(x)
        except BudgetError:
            if share == 0.9:
                raise
        else:
            break
    bench.token(x)
    stays = bench.registry.residency.resident()
    missing = [n for n in range(len(bench.held.runs)) if n not in stays]
    for _ in range(bench.times):
        plain = bench.plain_reads(missing)
        seconds = bench.token(x)
        bench.note("streamed", ratio=seconds / plain, milliseconds=1e3 * seconds, plain=1e3 * plain)
    return {
        "streaming_ratio": bench.middle("streamed", "ratio"),
        "streaming_ms": bench.middle("streamed", "milliseconds"),
        "streaming_limit": share,
    }


def _limit_held(bench: Bench, before: int, limit: int, seconds: float) -> dict[str, float]:
    """The highest memory above what there was before loading, over the limit, while maps and inputs change."""
    generator = torch.Generator().manual_seed(0)
    plans = [bench.at(level) for level in (2, 3, 4, 6, 8)]
    reset_peak_memory()
    ends = time.perf_counter() + seconds
    calls = 0
    while time.perf_counter() < ends:
        if calls % 5 == 0:
            foveate.apply(bench.model, plans[int(torch.randint(0, 5, (), generator=generator))])
        length = int(torch.randint(1, 17, (), generator=generator))
        bench.token(torch.randint(0, 4096, (1, length), generator=generator))
        calls += 1
    report = foveate.memory_report(bench.model)
    return {
        "limit_held": (peak_memory() - before) / limit,
        "limit_calls": calls,
        "limit_fetched": report.fetched,
        "limit_fallback_passes": max(report.fallback_count.values(), default=0),
    }


def measure(folder: Path, seconds: float, rounds: int) -> dict[str, Any]:
    """All of it; the figures, and the raw data."""
    ensure_loaded()
    transformers = require("transformers")
    small = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=64
    )
    with torch.inference_mode():  # what running any model imports and allocates once
        transformers.LlamaForCausalLM(small)(torch.tensor([[1]]))
    bench = Bench(folder, rounds)
    limit = bench.at(8).bytes_resident // 2
    gc.collect()
    before = _resident()
    bench.load(limit)
    figures = _limit_held(bench, before, limit, seconds)
    bench.load(1 << 50)
    for part in (_returned, _restored, _disk, _streamed):
        figures |= part(bench)
    return {
        "figures": figures,
        "rounds": bench.rounds,
        "stored": sum(run.size for run in bench.held.runs),
        "fixed": bench.held.fixed,
        "limit": limit,
    }


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))))
