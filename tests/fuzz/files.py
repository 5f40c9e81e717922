"""Tensors and side files with valid checksums and senseless contents, and with single bytes changed.

    PYTHONPATH=tests python tests/fuzz/files.py [files] [seed]

In turn: the tensors of a folder, the profile of a model in training, the file that a calibration is resumed from, maps,
and frontiers with times. Each gives an error of ours or something that works.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hostile import Watch, ended, mutated, no_network
from safetensors.torch import load, save_file
from torch import Tensor

import foveate as fv
from folders import X, skeleton
from foveate.activations.policy.profile import profile_checksum
from foveate.calibrate.resuming import _SAMPLE, ResumeFile, _digest, sample_of
from foveate.checkpoint.head import head_checksum
from foveate.collect.collector import Collector
from foveate.collect.kinds import find_weights
from foveate.files import checksum
from foveate.nn.registry import registry_of
from foveate.precision.timings import Timings
from frontiers import measured
from tiny import mlp, quantized_mlp, rows


def _changed(tensor: Tensor, choice: random.Random) -> Tensor:
    """The tensor with other values, another shape, or another dtype."""
    t, flat = tensor.clone(), tensor.reshape(-1)
    what = choice.randrange(7)
    if what == 0 and t.numel():
        value = choice.choice([float("nan"), float("inf"), -float("inf"), -1.0, 1e30, 0.0])
        at = choice.randrange(t.numel())
        if t.is_floating_point():
            t.view(-1)[at] = value
        else:
            t.view(-1)[at] = choice.choice([0, 1, 2, 5, 7, 100])
        return t
    if what == 1:
        return -t if t.is_floating_point() else t ^ 255 if t.dtype == torch.uint8 else -t
    if what == 2:
        return t.to(choice.choice([torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool]))
    if what == 3:
        return flat[: choice.randrange(t.numel() + 1)].clone()
    if what == 4:
        return torch.cat([flat, flat])
    if what == 5:
        return t.reshape(1, *t.shape)
    return torch.zeros_like(t)


def _bytes_changed(file: Path, choice: random.Random) -> None:
    content = bytearray(file.read_bytes())
    what = choice.randrange(4)
    if what == 0:
        content = content[: choice.randrange(len(content))]
    elif what == 1:
        content += bytes(choice.randrange(1, 100))
    else:
        for _ in range(choice.randint(1, 8)):
            # mostly in the head, where the tensors are described
            content[choice.randrange(min(len(content), choice.choice([8, 600, len(content)])))] = choice.randrange(256)
    file.write_bytes(content)


class _Tensors:
    """The tensors of a folder."""

    def __init__(self, place: Path) -> None:
        self.folder = place / "model"
        model, _ = quantized_mlp(exact=0.2)
        fv.save(model, self.folder)
        self.head = json.loads((self.folder / "foveate.json").read_bytes())
        self.files = {f.name: f.read_bytes() for f in self.folder.iterdir()}

    def case(self, choice: random.Random) -> Callable[[], object]:
        head = json.loads(json.dumps(self.head))
        part = choice.choice(list(head["files"]))
        file = self.folder / head["files"][part]["file"]
        file.write_bytes(self.files[file.name])
        if choice.random() < 0.3:
            _bytes_changed(file, choice)
        else:
            tensors = load(file.read_bytes())
            name = choice.choice(list(tensors))
            tensors[name] = _changed(tensors[name], choice)
            save_file(tensors, file)
            head["files"][part]["sha256"] = {key: checksum(t) for key, t in tensors.items()}
            head["sha256"] = head_checksum(head)
        (self.folder / "foveate.json").write_text(json.dumps(head))

        def read() -> None:
            try:
                fv.load_profile(self.folder)
                model = fv.load(self.folder, model=skeleton())
                with torch.no_grad():
                    model(X)
            finally:
                file.write_bytes(self.files[file.name])

        return read


class _Training:
    """The profile of a model in training."""

    def __init__(self, place: Path) -> None:
        self.file, self.model = place / "saved.json", mlp()
        with fv.compress_activations(self.model, error=0.2) as store:
            for x in rows(512, 70, 4):
                self.model(x).square().mean().backward()
        store.save_profile(self.file)
        self.text = self.file.read_bytes()

    def case(self, choice: random.Random) -> Callable[[], object]:
        self.file.write_bytes(self.text)
        if choice.random() < 0.3:
            _bytes_changed(self.file, choice)
        else:
            content = mutated(json.loads(self.text), choice)
            self.file.write_text(json.dumps({**content, "sha256": profile_checksum(content)}))
        return lambda: fv.compress_activations(self.model, error=0.2, profile=self.file).report()


class _Resumed:
    """The file that a calibration is resumed from."""

    def __init__(self, place: Path) -> None:
        self.file, self.model = place / "resume", mlp()
        self.batches = rows()
        self.sample = sample_of(self.model, self.batches[0])
        collector = self._collector()
        for batch in self.batches:
            collector.add(self.model, batch)
        ResumeFile(path=self.file, objective=fv.Logits(), sample=self.sample).write(collector.state())
        self.content = self.file.read_bytes()

    def _collector(self) -> Collector:
        return Collector(find_weights(self.model), fv.Logits())

    def case(self, choice: random.Random) -> Callable[[], object]:
        self.file.write_bytes(self.content)
        if choice.random() < 0.3:
            _bytes_changed(self.file, choice)
        else:
            tensors = load(self.file.read_bytes())
            name = choice.choice([name for name in tensors if name != _SAMPLE])
            tensors[name] = _changed(tensors[name], choice)
            about = {"foveate_resume": "3", "objective": "Logits"}
            about["sha256"] = _digest(about, {key: checksum(t) for key, t in tensors.items()})
            save_file(tensors, self.file, about)

        def read() -> None:
            collector = self._collector()
            collector.restore(ResumeFile(path=self.file, objective=collector.objective, sample=self.sample).read())
            for statistics in collector.by_module.values():
                found = statistics.fisher(max(collector.samples, 1))
                assert isinstance(found, Tensor) or bool(found.gradient_N.isfinite().all())
                if statistics.inputs is not None:
                    statistics.inputs.losses(collector.samples)
                    statistics.inputs.summary(collector.samples)

        return read


class _Maps:
    """Maps as JSON."""

    def __init__(self, place: Path) -> None:
        self.folder = place / "mapped"
        model, self.profile = quantized_mlp()
        fv.save(model, self.folder)
        plan = fv.allocate(self.profile, fv.Budget(bits=4.5))
        self.data = plan.to_json()
        self.plan = plan

    def case(self, choice: random.Random) -> Callable[[], object]:
        data = mutated(self.data, choice)

        def read() -> None:
            plan = fv.PrecisionMap.from_json(json.loads(json.dumps(data)), self.plan.sites, self.plan.other_bytes)
            fv.save_map(self.folder, plan)
            assert fv.read_head(self.folder).plan.levels == plan.levels

        return read


class _Frontiers:
    """Frontiers and times."""

    def __init__(self, place: Path) -> None:
        self.folder = place / "frontier"
        model, profile = quantized_mlp()
        products = {site.name: (0.0, 1e-6, 2e-6, 3e-6, 4e-6, 5e-6) for site in profile.weight_sites()}
        timings = Timings(machine="a machine, 2 threads", products=products, rest=1e-5)
        registry_of(model).profile = replace(profile, timings=timings)
        fv.save(model, self.folder, frontier=measured(fv.frontier(profile, 12), 4, 0))
        self.head = json.loads((self.folder / "foveate.json").read_bytes())
        self.file = self.folder / self.head["files"]["frontier"]["file"]
        self.content = self.file.read_bytes()

    def case(self, choice: random.Random) -> Callable[[], object]:
        head = json.loads(json.dumps(self.head))
        self.file.write_bytes(self.content)
        what = choice.random()
        if what < 0.2:
            _bytes_changed(self.file, choice)
        elif what < 0.4:
            tensors = load(self.file.read_bytes())
            name = choice.choice(list(tensors))
            tensors[name] = _changed(tensors[name], choice)
            save_file(tensors, self.file)
            head["files"]["frontier"]["sha256"] = {key: checksum(t) for key, t in tensors.items()}
        elif what < 0.8:
            head["frontier"] = mutated(head["frontier"], choice)
        else:
            head["profile"]["timings"] = mutated(head["profile"]["timings"], choice)
        head["sha256"] = head_checksum(head)
        (self.folder / "foveate.json").write_text(json.dumps(head))

        def read() -> None:
            profile, chain = fv.load_profile(self.folder), fv.load_frontier(self.folder)
            if profile.timings is not None:
                profile.timings.seconds_of(chain[-1])
            assert 0 <= chain.find("6") < len(chain)
            if chain.points:
                assert chain.kl(0) <= chain.kl(len(chain) - 1)

        return read


def fuzz(count: int, seed: int = 0) -> dict[str, Watch]:
    """Read so many files."""
    choice = random.Random(seed)
    with tempfile.TemporaryDirectory() as place, no_network(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds: list[Any] = [kind(Path(place)) for kind in (_Tensors, _Training, _Resumed, _Maps, _Frontiers)]
        watches = {(kind.__doc__ or "").rstrip("."): Watch() for kind in kinds}
        for number in range(count):
            if number % 1000 == 999:
                print(f"{number + 1:,}: {', '.join(map(str, watches.values()))}", file=sys.stderr, flush=True)
            kind = kinds[number % len(kinds)]
            read = kind.case(choice)
            watches[kind.__doc__.rstrip(".")].see(read, f"seed {seed}, number {number}")
    return watches


def _numbers() -> Iterator[int]:
    yield from map(int, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(ended(fuzz(*(list(_numbers()) or [20_000]))))
