"""What loading costs: bytes read from disk, peak memory, and what stays resident, each in a fresh process.

A Llama of random codes is written once with every plane and loaded at uniform 4 bits, at uniform 8 bits, and at a map
of half its tiles at 2 bits and half at 8. Files are dropped from the page cache before each load, so what a process
reads from the disk is what the load asked for (and what the system read ahead).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

import foveate
from foveate.bench.cases import require
from foveate.bench.result import Measured
from foveate.checkpoint import HEAD, Head, read_head
from foveate.collect.kinds import find_weights, weight_matrix_shape
from foveate.errors import FoveateError
from foveate.formats.levels import GAINED_LEVELS, NESTED_LEVELS, PLANES
from foveate.kernels.dispatch import ensure_loaded
from foveate.maps import PrecisionMap, Site, uniform
from foveate.nn.install import install, site_of
from foveate.nn.modules import PlaneWeight
from foveate.nn.persist import save
from foveate.nn.quantize import group_for
from foveate.nn.registry import apply
from foveate.planes import PlaneTensor, from_codes, shared_tags


def _random_planes(rows: int, columns: int, generator: torch.Generator) -> PlaneTensor:
    group = group_for(columns)

    def codes() -> torch.Tensor:
        return torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator)

    scale = torch.full((rows, -(-columns // group)), 0.002, dtype=torch.float16)
    return from_codes(
        codes(), codes(), scale, torch.zeros_like(scale), torch.ones(len(GAINED_LEVELS), 1).half(), group=group, reach=0
    )


def write_model(path: Path, width: int, layers: int) -> None:
    """Save a Llama whose weights are random codes, with every plane."""
    transformers = require("transformers")
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    found = find_weights(model)
    planes = shared_tags([_random_planes(*weight_matrix_shape(f.modules[0]), generator) for f in found])
    sites = [site_of(f, p) for f, p in zip(found, planes, strict=True)]
    weights = {s.name: PlaneWeight(p, torch.float32) for s, p in zip(sites, planes, strict=True)}
    registry = install(model, found, sites, weights)
    for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if "inv_freq" in n)):
        tensor.data.fill_(1.0)
    apply(model, uniform(registry.sites, 8, registry.other_bytes))
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
    """Make the system forget the files' contents; whether it can be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in path.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _load_alone(path: Path, plan_file: Path) -> dict[str, Any]:
    source = str(Path(foveate.__file__).parent.parent)
    paths = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "foveate.bench.load_child", str(path), str(plan_file)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        raise FoveateError(f"the process that loads the model ended with {done.returncode}: {last}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(width: int = 1024, layers: int = 16, times: int = 3) -> Measured:
    """Load a model in fresh processes; figures are medians.

    Args:
        width: of the model; at least 512, so that groups are of 128.
        layers: of the model.
        times: loads of each map, taken in turns.
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
                found = _load_alone(path, Path(folder) / name)
                rounds.append({"map": name, **found, "asked_for": _asked_for(path, head, plan)})
    return _figures(rounds, plans, dropped)


def _figures(rounds: list[dict[str, Any]], plans: dict[str, PrecisionMap], dropped: bool) -> Measured:
    def middle(name: str, what: str) -> float:
        return float(median(r[what] for r in rounds if r["map"] == name))

    # the disk was really read if every load read at least what its planes take
    seen = dropped and all(r["read"] is not None and r["read"] >= 0.9 * r["asked_for"] for r in rounds)
    read = "read" if seen else "asked_for"
    figures = {
        "bytes_read_b4_over_b8": middle("b4", read) / middle("b8", read),
        "peak_memory_b4_over_b8": middle("b4", "peak") / middle("b8", "peak"),
        "resident_mixed_over_b8": middle("mixed", "resident") / middle("b8", "resident"),
        "resident_b4_over_b8": middle("b4", "resident") / middle("b8", "resident"),
    }
    for name in plans:
        figures[f"bytes_read_{name}"] = middle(name, read)
        figures[f"peak_memory_{name}"] = middle(name, "peak")
        figures[f"resident_{name}"] = middle(name, "resident")
        figures[f"seconds_{name}"] = middle(name, "seconds")
    how = (
        "bytes read from the disk by the process, after its files were dropped from the page cache"
        if seen
        else "bytes of the files that the load opens, for this system does not say what was read from the disk"
    )
    computed = ", ".join(f"{name} {plan.bytes_resident}" for name, plan in plans.items())
    notes = (
        f"bytes_read: {how}",
        "peak memory: the process's highest resident size while loading, less what it had before",
        f"resident: what the process grew by, modules and unfilled huge pages included; the maps say {computed} bytes",
    )
    return Measured(figures, rounds, notes)
