"""The cost of loading: bytes read from disk, peak memory and resident memory, each in a fresh process.

A Llama of random codes is saved once with every plane. It is loaded at uniform 4 bits, at uniform 8 bits, and by a map
with half of the tiles at 2 bits and half at 8 bits. The files are dropped from the page cache before each load, so that
the process reads from disk what the load asks for, and what the system reads ahead.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from foveate.bench.fresh_process.run import run_in_fresh_process
from foveate.bench.shared.random_model import random_llama
from foveate.bench.shared.result import Measured
from foveate.checkpoint import HEAD, Head, read_head
from foveate.folder.save import save
from foveate.formats.levels import NESTED_LEVELS, PLANES
from foveate.kernels.backends.table import ensure_loaded
from foveate.precision.maps import PrecisionMap, Site, uniform


def write_model(path: Path, width: int, layers: int) -> None:
    """Save a Llama whose weights are random codes, with every plane."""
    model = random_llama(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        tie_word_embeddings=True,
    )
    save(model, path)


def half_and_half(sites: tuple[Site, ...], other_bytes: int) -> PrecisionMap:
    """Half the tiles of every weight at 2 bits, half at 8, in random order."""
    generator = torch.Generator().manual_seed(1)
    plan = uniform(sites, 8, other_bytes)
    levels = dict(plan.levels)
    for site in plan.weight_sites():
        order = torch.randperm(site.tiles, generator=generator)
        levels[site.name] = bytes(torch.where(order < site.tiles // 2, 2, 8).tolist())
    return PrecisionMap(plan.sites, levels, other_bytes)


def _asked_for(path: Path, head: Head, plan: PrecisionMap) -> int:
    """Bytes of the head and of the files whose tensors a load of this map reads."""
    highest = max(max(n for n, tiles in plan.counts(s).items() if tiles) for s in plan.weight_sites())
    parts = ["scales", "rest", *(f"plane{p}" for p in range(PLANES) if NESTED_LEVELS[p] <= highest)]
    return sum((path / name).stat().st_size for name in (HEAD, *(head.files[part] for part in parts)))


def _drop_from_cache(path: Path) -> bool:
    """Drop the files from the page cache; returns whether the system offers this."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in path.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def measure(width: int = 1024, layers: int = 16, times: int = 3) -> Measured:
    """Load a model in fresh processes; figures are medians.

    Args:
        width: the width of the model; at least 512, so that groups have 128 inputs.
        layers: the number of layers of the model.
        times: the number of loads of each map, taken in turns.
    """
    ensure_loaded()
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        write_model(path, width, layers)
        head = read_head(path)
        plans = {f"b{level}": uniform(head.sites, level, head.other_bytes) for level in (4, 8)}
        plans["mixed"] = half_and_half(head.sites, head.other_bytes)
        for name, plan in plans.items():
            (Path(folder) / name).write_text(json.dumps(plan.to_json()))
        dropped = True
        for _ in range(times):
            for name, plan in plans.items():
                dropped = _drop_from_cache(path) and dropped
                found = run_in_fresh_process("foveate.bench.fresh_process.load", str(path), str(Path(folder) / name))
                rounds.append({"map": name, **found, "asked_for": _asked_for(path, head, plan)})
    return _figures(rounds, plans, dropped)


def _ratio(of: float, to: float) -> float:
    """NaN where a process did not grow: it was as large before."""
    return of / to if to else math.nan


def _figures(rounds: list[dict[str, Any]], plans: dict[str, PrecisionMap], dropped: bool) -> Measured:
    def middle(name: str, what: str) -> float:
        return float(median(r[what] for r in rounds if r["map"] == name))

    # the loads read from the disk if each read at least 90 % of what it asked for
    seen = dropped and all(r["read"] is not None and r["read"] >= 0.9 * r["asked_for"] for r in rounds)
    read = "read" if seen else "asked_for"
    figures = {
        "bytes_read_b4_over_b8": middle("b4", read) / middle("b8", read),
        "peak_memory_b4_over_b8": _ratio(middle("b4", "peak"), middle("b8", "peak")),
        "resident_mixed_over_b8": _ratio(middle("mixed", "resident"), middle("b8", "resident")),
        "resident_b4_over_b8": _ratio(middle("b4", "resident"), middle("b8", "resident")),
    }
    for name in plans:
        figures[f"bytes_read_{name}"] = middle(name, read)
        figures[f"peak_memory_{name}"] = middle(name, "peak")
        figures[f"resident_{name}"] = middle(name, "resident")
        figures[f"seconds_{name}"] = middle(name, "seconds")
    how = (
        "bytes read from the disk by the process, after its files were dropped from the page cache"
        if seen
        else "bytes of the files that the load opens, since this system does not report what was read from the disk"
    )
    computed = ", ".join(f"{name} {plan.bytes_resident}" for name, plan in plans.items())
    notes = (
        f"bytes_read: {how}",
        "peak memory: the process's highest resident size while loading, less what it had before",
        f"resident: what the process grew by, modules and unfilled huge pages included; the maps say {computed} bytes",
    )
    return Measured(figures, rounds, notes)
