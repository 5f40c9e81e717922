"""One process of a shared calibration: quantizes some models, and writes what came out of each.

    python shared_child.py FOLDER RANK COUNT [fail-after-N-writes-of-the-resume-file]

COUNT 0 is a process alone, without a group. Written is FOLDER/out-COUNT-RANK.json: by case, a SHA-256 of all planes,
losses and statistics, and what the profile says in words.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import foveate as fv
from foveate.calibrate.passes import calibration
from foveate.calibrate.processes.resuming import ResumeFiles
from foveate.calibrate.schedule import Schedule, cut
from foveate.nn.registry import registry_of
from foveate.precision.profiles import Profile
from tiny import generator, llama, mlp, tokens

TRANSFORMER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 32,
}  # fmt: skip


class ReadsPast(nn.Module):
    """Reads a weight past its module, but on some of the data only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = nn.Linear(40, 48), nn.Linear(48, 40)

    def forward(self, x: Tensor) -> Tensor:
        """Positive batches are multiplied with the weight itself."""
        if float(x.sum()) > 0:
            return self.down(torch.tanh(x @ self.up.weight.t()))
        return self.down(torch.tanh(self.up(x)))


def mixture() -> nn.Module:
    """Some experts are hardly ever met."""
    torch.manual_seed(0)
    config = MixtralConfig(**TRANSFORMER, num_local_experts=6, num_experts_per_tok=2)
    return MixtralForCausalLM(config).eval()


def images(count: int = 10) -> list[Tensor]:
    """Batches of different sizes."""
    return [torch.randn(3 + i % 3, 3, 8, 8, generator=generator(i)) for i in range(count)]


def convolutions() -> nn.Module:
    """A small network of convolutions."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 20, 3), nn.ReLU(), nn.Conv2d(20, 8, 3, groups=2), nn.Flatten(), nn.Linear(128, 7))


def depthwise() -> nn.Module:
    """A depthwise convolution has no statistic but a matrix."""
    torch.manual_seed(2)
    layers = [nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 4, 1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(144, 5))


def signed_rows(count: int = 9) -> list[Tensor]:
    """All negative sums, except one batch."""
    made = [torch.randn(50, 40, generator=generator(i)) for i in range(count)]
    return [-x.sign() * x if i != 5 else x.abs() for i, x in enumerate(made)]


CASES: dict[str, Callable[[], tuple[nn.Module, list[Any], dict[str, Any]]]] = {
    "llama": lambda: (llama(), tokens(36, 12, batches=9), {}),
    "three parts": lambda: (llama(tie_word_embeddings=True), tokens(20, 12, batches=5), {}),
    "mixture": lambda: (mixture(), tokens(40, 8, batches=20), {}),
    "embeddings": lambda: (mlp(), [torch.randn(30, 70, generator=generator(i)) for i in range(7)], {"exact": 0.2}),
    "convolutions": lambda: (convolutions(), images(), {"objective": fv.Logits()}),
    "one weight a pass": lambda: (depthwise(), images(9), {"objective": fv.Logits()}),
    "reads past": lambda: (ReadsPast(), signed_rows(), {"objective": fv.Logits()}),
    "one batch": lambda: (mlp(), [torch.randn(90, 70, generator=generator(0))], {"objective": fv.Logits()}),
}


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "three parts": lambda costs, *_: Schedule(True, cut(costs, 3), True, 0),
    "one weight a pass": lambda costs, *_: Schedule(False, tuple((i,) for i in range(len(costs))), False, 0),
}


def digest(model: nn.Module, profile: Profile) -> str:
    """Of everything that the calibration made."""
    total = hashlib.sha256()
    registry = registry_of(model)
    for site in profile.sites:
        total.update(repr(site).encode())
        if site.kind == "weight":
            for tensor in registry.weights[site.name].value.tensors:
                total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for tensor in (profile.losses.get(site.name), *profile.statistics.get(site.name, {}).values()):
            if tensor is not None:
                total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    total.update(repr(profile.measured_over_summed).encode())
    return total.hexdigest()


def main(folder: Path, rank: int, count: int, stop: int) -> None:
    """Run all cases, or with `stop` the first one, until the resume file was written so often."""
    group = None
    if count:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store-{count}-{stop}", rank=rank, world_size=count,
            timeout=timedelta(seconds=120),
        )  # fmt: skip
        group = dist.group.WORLD
    resume = {"resume": folder / "resume"} if (folder / "resuming").exists() else {}
    if stop:
        written, write = [], ResumeFiles.write

        def counted(files: ResumeFiles, totals: dict[str, Tensor], shards: int) -> None:
            write(files, totals, shards)
            written.append(shards)
            if len(written) == stop and not (rank == 0 and (folder / "first stays").exists()):
                os._exit(9)

        ResumeFiles.write = counted  # type: ignore[method-assign, assignment]
    found = {}
    make_schedule = calibration.make_schedule
    for name in ["llama"] if resume else CASES:
        model, batches, options = CASES[name]()
        if (folder / "other data").exists():
            batches = batches[rank:]
        elif (folder / "other options").exists():
            options = {"objective": fv.Embedding() if rank else fv.Logits(), "group": 32 << rank}
        elif (folder / "more data").exists():
            batches = [*batches, *batches]
        calibration.make_schedule = SCHEDULES.get(name, make_schedule)  # type: ignore[attr-defined]
        profile = fv.quantize(model, batches, progress=False, processes=group, **options, **resume)
        found[name] = {
            "digest": digest(model, profile),
            "notes": profile.notes,
            "samples": profile.samples,
            "losses": {n: float(t.double().sum()) for n, t in profile.losses.items()},
            "measured": profile.measured_over_summed,
        }
    (folder / f"out-{count}-{rank}.json").write_text(json.dumps(found))
    if count:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int((*sys.argv[4:], "0")[0]))
