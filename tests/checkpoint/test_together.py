"""Several processes use one folder: a writer waits for another, and a reader gets all of one save."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import foveate as fv
from folders import X, copy_of, skeleton
from foveate.checkpoint import files as checkpoint_files
from foveate.checkpoint import folder as checkpoint_folder
from foveate.errors import CheckpointError
from foveate.files import LOCK, locked
from tiny import mlp, rows


@pytest.fixture(scope="module")
def other() -> nn.Module:
    """Another model of the same shape."""
    model = mlp(seed=7)
    fv.quantize(model, rows(), objective=fv.Logits(), progress=False)
    return model


def _same(a: nn.Module, b: nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(a(X), b(X))


def test_a_save_waits_for_whoever_holds_the_folder(
    saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path, other: nn.Module
) -> None:
    folder = copy_of(saved[0], tmp_path / "model")
    before = (folder / "foveate.json").read_bytes()
    thread = threading.Thread(target=lambda: fv.save(other, folder))
    with locked(folder):
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert (folder / "foveate.json").read_bytes() == before
    thread.join(60)
    assert _same(fv.load(folder, model=skeleton()), other)


def test_an_interrupt_after_the_head_is_in_place_removes_nothing_that_it_names(
    saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path, other: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(saved[0], tmp_path / "model")
    commit = checkpoint_files.commit

    def interrupted(temporary: Path, target: Path) -> None:
        commit(temporary, target)
        if target.name == "foveate.json":
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_files, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fv.save(other, folder)
    assert _same(fv.load(folder, model=skeleton()), other)


def test_a_reader_whose_files_were_replaced_reads_the_new_ones(
    saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path, other: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(saved[0], tmp_path / "model")
    read_head = checkpoint_folder.read_head
    saves = [other, saved[1], other]

    def replaced(path: Any) -> fv.Head:
        head = read_head(path)
        if saves:
            fv.save(saves.pop(), path)
        return head

    monkeypatch.setattr(checkpoint_folder, "read_head", replaced)
    assert _same(fv.load(folder, model=skeleton()), other)
    assert not saves


def test_an_open_folder_is_read_whole_whatever_is_saved(
    saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path, other: nn.Module
) -> None:
    folder = copy_of(saved[0], tmp_path / "model")
    with checkpoint_folder.opened(folder) as one:
        fv.save(other, folder)
        for part, names in one.head.checksums.items():
            for name in names:
                one.read(part, name, 1 << 30)


def test_a_profile_that_was_replaced_is_not_another_models(
    saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path, other: nn.Module
) -> None:
    folder = copy_of(saved[0], tmp_path / "model")
    first, second = (fv.load(folder, model=skeleton()) for _ in range(2))
    fv.save_map(folder, saved[2].uniform(4))  # of the same model
    profile = fv.profile_of(first)
    assert profile is not None
    assert torch.equal(profile.losses["0:weight"], saved[2].losses["0:weight"])
    fv.save(other, folder)
    with pytest.raises(CheckpointError, match="holds another save than the model was loaded from"):
        fv.profile_of(second)


def test_what_a_kill_leaves_does_not_block(
    saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path, other: nn.Module
) -> None:
    folder = copy_of(saved[0], tmp_path / "model")
    (folder / LOCK).touch()
    (folder / ".foveate-abc").mkdir()
    (folder / ".foveate-abc" / "half").write_bytes(b"x")
    fv.save(other, folder)
    assert not (folder / ".foveate-abc").exists()


def test_a_lock_that_is_no_file_is_refused(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    folder = copy_of(saved[0], tmp_path / "model")
    (folder / LOCK).unlink(missing_ok=True)
    os.mkfifo(folder / LOCK)
    with pytest.raises(CheckpointError, match="not a regular file"):
        fv.save(saved[1], folder)


def test_without_locks_a_warning_says_so(
    saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foveate.files.lock._flock", lambda: None)
    with pytest.warns(RuntimeWarning, match="cannot be locked .* nothing else may save to it meanwhile"):
        fv.save(saved[1], tmp_path / "model")


def test_a_first_save_that_fails_leaves_no_folder_and_the_next_goes_on(
    saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "new" / "model"
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(checkpoint_files, "commit", full)
        with pytest.raises(CheckpointError, match="No space"):
            fv.save(saved[1], folder)
    assert not folder.parent.exists()
    fv.save(saved[1], folder)
    assert _same(fv.load(folder, model=skeleton()), saved[1])
