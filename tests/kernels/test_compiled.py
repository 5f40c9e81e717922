"""Compiled kernels are loaded from the cache only where nobody but the user, or root, can have written them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from foveate.kernels.backends.cpu import compiled
from foveate.kernels.backends.cpu import library as cpu
from foveate.kernels.backends.table import ensure_loaded


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library in a cache, which nothing can load."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name = f"kernels-{compiled.fingerprint(cpu.source_files(), cpu.FLAGS)}"
    target = compiled.cache_folder() / name / "foveate_cpu.so"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"")
    for path, mode in ((target, 0o755), (target.parent, 0o755), (target.parent.parent, 0o755)):
        path.chmod(mode)
    return target


def test_sources_have_a_name_each() -> None:
    """An object file is named by its source alone, and the folders of all are one."""
    names = [path.stem for path in cpu.source_files() if path.suffix == ".cpp"]
    assert len(set(names)) == len(names) >= 9


def test_a_fingerprint_is_of_names_and_contents(tmp_path: Path) -> None:
    def made(folder: str, *names: str) -> str:
        files = [tmp_path / folder / name for name in names]
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("int x;")
        return compiled.fingerprint(files)

    first = made("here", "a/one.h", "b/two.h")
    assert made("there", "a/one.h", "b/two.h") == first
    assert made("there", "b/one.h", "a/two.h") != first
    (tmp_path / "here/a/one.h").write_text("int y;")
    assert compiled.fingerprint([tmp_path / "here/a/one.h", tmp_path / "here/b/two.h"]) != first


def test_what_is_the_users_alone_is_trusted(kept: Path) -> None:
    assert compiled.distrusted(kept) is None
    assert compiled.distrusted(kept.parent.with_name("kernels-new") / kept.name) is None


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_others_can_write_is_not(kept: Path, what: str, mode: int) -> None:
    path = kept if what == "file" else kept.parent
    path.chmod(mode)
    assert compiled.distrusted(kept) == f"{path} can be written by others (mode {mode:04o})"


def test_the_cache_itself_is_closed_to_others(kept: Path) -> None:
    cache = kept.parent.parent
    cache.chmod(0o777)
    assert compiled.distrusted(kept) is None
    assert cache.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("what", ["file", "folder", "cache"])
def test_what_belongs_to_others_is_not(kept: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = {"file": kept, "folder": kept.parent, "cache": kept.parent.parent}[what]
    real = os.stat

    class Other:
        def __init__(self, status: os.stat_result) -> None:
            self.st_uid, self.st_mode = 12345, status.st_mode

    def lstat(self: Path) -> object:
        status = real(self, follow_symlinks=False)
        return Other(status) if self == path else status

    monkeypatch.setattr(Path, "lstat", lstat)
    monkeypatch.setattr(Path, "stat", lstat)
    assert compiled.distrusted(kept) == f"{path} belongs to another user (uid 12345)"


def test_links_are_not(kept: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.so"
    kept.rename(elsewhere)
    kept.symlink_to(elsewhere)
    assert compiled.distrusted(kept) == f"{kept} is not a regular file"
    kept.unlink()
    os.mkfifo(kept)
    assert compiled.distrusted(kept) == f"{kept} is not a regular file"
    kept.unlink()
    kept.parent.rename(tmp_path / "moved")
    kept.parent.symlink_to(tmp_path / "moved")
    assert compiled.distrusted(kept) == f"{kept.parent} is not a folder"


@pytest.mark.skipif(ensure_loaded().isa is None, reason="no compiled kernels")
def test_a_file_that_is_not_trusted_is_never_loaded(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.chmod(0o777)
    loaded: list[Path] = []
    built: list[Path | None] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(cpu, "build", lambda name, sources, flags, target, include: built.append(target))
    with pytest.warns(RuntimeWarning, match=r"compiles them for this process alone: .* can be written by others"):
        status = cpu.load.__wrapped__()
    assert (loaded, built) == ([], [None])
    assert status.path is None
    assert "this process alone" in status.reason
    kept.chmod(0o755)
    assert cpu.load.__wrapped__().reason == "from the cache"
    assert loaded == [kept]


def test_what_is_built_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import cpp_extension

    def load(name: str, build_directory: str, **_: object) -> None:
        (Path(build_directory) / f"{name}.so").write_bytes(b"")

    monkeypatch.setattr(cpp_extension, "load", load)
    before = os.umask(0o002)
    try:
        target = tmp_path / "cache" / "kernels-1" / "made.so"
        compiled.build("made", [], [], target)
        compiled.build("made", [], [], None)
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (target, target.parent, target.parent.parent)] == [0o700] * 3
    assert [path.name for path in target.parent.iterdir()] == ["made.so"]
    assert compiled.distrusted(target) is None
