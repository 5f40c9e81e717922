"""Processes and threads that save to one folder and load from it at once, some of them killed in the middle.

    PYTHONPATH=tests python tests/fuzz/saves.py [rounds] [processes] [seed]

Every save succeeds and is followed by clean-up, every load gives one of the saved models whole, and after each round,
kills included, the folder holds one of them and can be saved to.
"""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import foveate as fv
from folders import X, skeleton
from foveate.checkpoint import opened
from tiny import mlp, rows

_MODELS, _LEVELS = 3, (4, 8)
#: Seconds that a round may take before it counts as hanging, however many share the processor.
_PATIENCE = 120.0


def models() -> list[nn.Module]:
    """Models of one shape, so that the files of one would fit the head of another."""
    made = []
    for seed in range(_MODELS):
        model = mlp(seed=seed)
        fv.quantize(model, rows(seed=seed), objective=fv.Logits(), progress=False)
        made.append(model)
    return made


class Jobs:
    """What a process does, and how it tells whether what it got is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.models = folder, models()
        self.profiles: list[Any] = [fv.profile_of(model) for model in self.models]
        self.outputs: dict[bytes, tuple[int, int]] = {}
        for which, model in enumerate(self.models):
            for level in _LEVELS:
                fv.apply(model, self.profiles[which].uniform(level))
                with torch.no_grad():
                    self.outputs[model(X).numpy().tobytes()] = which, level
            fv.apply(model, self.profiles[which].uniform(8))

    def do(self, job: str, seed: int) -> str:
        """Do one job; returns what came of it."""
        choice = random.Random(seed)
        try:
            said: str | None = getattr(self, f"_{job}")(choice)
        except Exception as error:
            return f"{job}: {type(error).__name__}: {error}"
        return said or f"{job}: good"

    def _save(self, choice: random.Random) -> None:
        which = choice.randrange(_MODELS)
        plan = self.profiles[which].uniform(choice.choice(_LEVELS))
        # what keeps fewer planes cannot be given a finer map by others, so planes are all kept now and then
        fv.save(self.models[which], self.folder, keep=plan if choice.random() < 0.5 else None)

    def _map(self, choice: random.Random) -> None:
        with contextlib.suppress(fv.PlaneNotResidentError):  # another save kept fewer planes
            fv.save_map(self.folder, self.profiles[choice.randrange(_MODELS)].uniform(choice.choice(_LEVELS)))

    def which(self) -> int:
        """The model that a load gives; raises if it is none of them."""
        model = fv.load(self.folder, model=skeleton())
        with torch.no_grad():
            found = self.outputs.get(model(X).numpy().tobytes())
        if found is None:
            raise AssertionError("the model loaded is none of those saved")
        try:
            profile = fv.profile_of(model)
        except fv.CheckpointError as error:
            if "holds another save" not in str(error):
                raise
        else:
            assert profile is not None
            if not _equal(profile, self.profiles[found[0]]):
                raise AssertionError("the profile is of another model")
        return found[0]

    def _load(self, _: random.Random) -> None:
        self.which()

    def _read(self, _: random.Random) -> None:
        found = fv.load_profile(self.folder)
        if not any(_equal(found, profile) for profile in self.profiles):
            raise AssertionError("the profile is of no model saved")
        fv.read_head(self.folder)
        with opened(self.folder) as folder:
            assert folder.bytes > 0

    def _killed(self, choice: random.Random) -> None:
        """Save again and again in a process of its own, and kill that."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads that a forked process lacks
            child = os.fork()
        if not child:
            try:
                while True:
                    self._save(choice)
            finally:
                os._exit(1)
        time.sleep(choice.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _equal(a: fv.Profile, b: fv.Profile) -> bool:
    return all(torch.equal(t, b.losses[name]) for name, t in a.losses.items())


def _one(jobs: Jobs, tasks: list[tuple[str, int]], said: list[str]) -> None:
    said.extend(jobs.do(*task) for task in tasks)


def _work(folder: Path, pipe: Any) -> None:
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (who waits for whom)
    jobs = Jobs(folder)
    pipe.send("ready")
    while (tasks := pipe.recv()) is not None:
        said: list[str] = []
        threads = [threading.Thread(target=_one, args=(jobs, each, said)) for each in tasks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        pipe.send(said)


def fuzz(rounds: int, processes: int = 4, seed: int = 0) -> collections.Counter[str]:
    """So many rounds; returns how often what came of a job."""
    choice = random.Random(seed)
    found: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        jobs = Jobs(folder)
        fv.save(jobs.models[0], folder)
        context = multiprocessing.get_context("spawn")
        pipes, children = [], []
        for _ in range(processes):
            mine, theirs = context.Pipe()
            children.append(context.Process(target=_work, args=(folder, theirs), daemon=True))
            children[-1].start()
            pipes.append(mine)
        try:
            for pipe in pipes:
                pipe.recv()
            for _ in range(rounds):
                now = choice.sample(pipes, choice.randint(min(2, processes), processes))
                for pipe in now:
                    pipe.send(_tasks(choice))
                for pipe in now:
                    if not pipe.poll(_PATIENCE):
                        found["a round hangs"] += 1
                        return found
                    found.update(pipe.recv())
                found[jobs.do("load", 0)] += 1
                found[jobs.do("read", 0)] += 1
            with opened(folder) as last:
                named = {"foveate.json", ".foveate-lock", *last.head.files.values()}
            fv.save(jobs.models[0], folder)
            left = {f.name for f in folder.iterdir()} - {*fv.read_head(folder).files.values()} - named
            found["files are left behind"] += len(left)
        finally:
            for pipe in pipes:
                with contextlib.suppress(OSError):
                    pipe.send(None)
            for child in children:
                child.join(10)
                child.kill()
    return found


def _tasks(choice: random.Random) -> list[list[tuple[str, int]]]:
    """What the threads of one process do, each in turn."""
    if choice.random() < 0.15:
        return [[("killed", choice.randrange(1 << 30))]]  # alone: a process with threads is not to be forked
    kinds = ("save", "save", "map", "load", "load", "load", "read")
    return [
        [(choice.choice(kinds), choice.randrange(1 << 30)) for _ in range(choice.randint(1, 3))]
        for _ in range(choice.randint(1, 2))
    ]


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]] or [500]
    came = fuzz(*numbers)
    for said, count in came.most_common():
        print(f"{count} times {said}")
    sys.exit(0 if all(said.endswith(": good") or not count for said, count in came.items()) else 1)
