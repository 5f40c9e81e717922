"""Folders whose planes are cut into runs of a few hundred bytes."""

from __future__ import annotations

import pytest
from resident import SIZES, Saved

import foveate as fv
from foveate.checkpoint import runs as checkpoint_runs
from tiny import mlp, rows


@pytest.fixture(scope="session")
def small_runs(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A folder whose planes are cut into runs of at least 512 bytes, with its model and profile."""
    model = mlp(SIZES)
    profile = fv.quantize(model, rows(64, SIZES[0]), objective=fv.Logits(), progress=False)
    folder = tmp_path_factory.mktemp("runs") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_runs, "LEAST_RUN", 512)
        fv.save(model, folder)
    return folder, model, profile
