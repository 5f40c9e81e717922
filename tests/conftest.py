"""One thread, one seed, no deadlines: the same run every time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

import foveate as fv
from tiny import quantized_mlp

settings.register_profile(
    "foveate",
    deadline=None,
    derandomize=True,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("foveate")

# torch says most things once a process; warnings of ours are errors, and must not depend on the order of the tests
torch.set_warn_always(True)


def pytest_configure(config: pytest.Config) -> None:
    """Warnings that the tests' own lines cause are errors too, as those of foveate's are (pyproject.toml)."""
    names = "|".join(sorted({file.stem for file in Path(__file__).parent.rglob("*.py")}))
    config.addinivalue_line("filterwarnings", f"error:::({names})$")


@pytest.fixture(autouse=True, scope="module")
def _loaded_modules_are_no_garbage() -> None:
    """Quantizing collects garbage, which would look through all of torch and transformers each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_every_time() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # `torch.manual_seed` writes the stack down for each kind of device that is not there, thousands of times in a run
    torch.default_generator.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, fv.Profile]:
    model, profile = quantized_mlp()
    folder = tmp_path_factory.mktemp("saved") / "model"
    fv.save(model, folder)
    return folder, model, profile
