"""Profiles and measured frontiers that tests of several rooms are made of."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from foveate.precision.frontiers import Frontier, Point, point_name
from foveate.precision.maps import Site
from foveate.precision.profiles import Profile
from tiny import generator

SHAPES = ((64, 300, 128), (100, 96, 32), (16, 1000, 64), (33, 40, 32))


def random_profile(seed: int, shapes: Sequence[tuple[int, int, int]] = SHAPES) -> Profile:
    """Losses that fall about fourfold a bit."""
    g = generator(seed)
    sites, losses = [], {}
    for i, (rows, columns, group) in enumerate(shapes):
        site = Site(f"layer{i}:weight", "weight", rows, columns, group, bool(i % 2), rows)
        size = torch.rand(site.tiles, 1, generator=g).mul(6).exp()
        losses[site.name] = size * torch.tensor([20.0, 1.0, 0.25, 0.0625, 0.004, 0.00025])
        sites += [site, Site(f"layer{i}:input", "input", 0, columns)]
    return Profile(tuple(sites), losses, 1000, 10, "logits")


def measured(chain: Frontier, count: int, seed: int) -> Frontier:
    """The frontier with measurements at so many indices, somewhat out of order as noise makes them."""
    choice = random.Random(seed)
    last = len(chain) - 1
    indices = sorted({round(last * i / (count - 1)) for i in range(count)} | {0, last})
    points = []
    for i in indices:
        plan = chain[i]
        points.append(
            Point(
                index=i,
                name=f"{point_name(plan)} at {i}" if i else point_name(plan),
                bits=plan.bits,
                bytes_read=plan.bytes_read,
                divergence=0.01 * plan.predicted_loss * choice.uniform(0.5, 2),
                standard_error=0.001,
                seconds=1e-3 + 1e-7 * plan.bytes_read * choice.uniform(0.8, 1.2),
                batch_seconds=1e-2 + 1e-8 * plan.bytes_read,
            )
        )
    return replace(chain, points=tuple(points), unit="nats", machine="a machine, 2 threads")
