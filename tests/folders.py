"""Checkpoints that the tests load, copy and damage."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import foveate as fv
from foveate.checkpoint.head import head_checksum
from tiny import mlp, rows

X = rows(seed=5)[0]
LEVELS = (0, 2, 3, 4, 6, 8)


def skeleton() -> nn.Module:
    with torch.device("meta"):
        return mlp()


def mixed(profile: fv.Profile, seed: int = 0, top: int = 8) -> fv.PrecisionMap:
    plan = profile.uniform(top)
    levels = dict(plan.levels)
    for i, site in enumerate(profile.weight_sites()):
        choice = random.Random(seed + i)
        levels[site.name] = bytes(choice.choice([level for level in LEVELS if level <= top]) for _ in range(site.tiles))
    return fv.PrecisionMap(plan.sites, levels, plan.other_bytes)


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def at(model: nn.Module, plan: fv.PrecisionMap) -> torch.Tensor:
    before = fv.current_map(model)
    fv.apply(model, plan)
    with torch.no_grad():
        y: torch.Tensor = model(X)
    fv.apply(model, before)
    return y


def read_all(folder: Path) -> nn.Module:
    fv.load_profile(folder)
    return fv.load(folder, model=skeleton())


def rewrite(folder: Path, change: Callable[[Any], Any], *, signed: bool = True) -> None:
    file = folder / "foveate.json"
    data = json.loads(file.read_bytes())
    data = change(data)
    if signed and isinstance(data, dict):
        data["sha256"] = head_checksum(data)
    file.write_text(json.dumps(data))


def with_(**changes: Any) -> Callable[[Any], Any]:
    return lambda data: {**data, **changes}


def parts(folder: Path) -> list[str]:
    return ["foveate.json", *fv.read_head(folder).files.values()]
