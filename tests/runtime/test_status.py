from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from foveate.errors import FoveateError
from foveate.runtime.status import find_status, private_folder, process_start, read_status, status_folder, write_status


def _status(pid: int | None = None, **more: Any) -> dict[str, Any]:
    pid = os.getpid() if pid is None else pid
    return {"pid": pid, "started": process_start(os.getpid()), "updated": 1.0, **more}


def test_the_folder_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = private_folder(status_folder())
    assert folder == tmp_path / "foveate"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert private_folder(folder).stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert status_folder() == tmp_path / ".cache/foveate/run"


def test_a_link_or_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        with pytest.raises(FoveateError, match="is not a folder"):
            private_folder(tmp_path / name)


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = private_folder(tmp_path / "run")
    write_status(folder / "1-0.json", _status())
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    with pytest.raises(FoveateError, match="another user"):
        private_folder(folder)
    with pytest.raises(FoveateError, match="is not a regular file of this user"):
        read_status(folder / "1-0.json")


def test_a_status_is_private_and_is_found(tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "run")
    file = folder / f"{os.getpid()}-0.json"
    write_status(file, _status(index=3))
    assert file.stat().st_mode & 0o077 == 0
    assert find_status(folder)["index"] == 3
    write_status(folder / f"{os.getpid()}-1.json", _status(index=4) | {"updated": 2.0})
    assert find_status(folder, os.getpid())["index"] == 4


def test_a_process_that_ended_or_whose_number_was_given_again_is_no_manager(tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "run")
    gone = 2**22 + 1  # beyond the greatest number that Linux gives
    write_status(folder / f"{gone}-0.json", _status(gone))
    write_status(folder / f"{os.getpid()}-0.json", _status() | {"started": 1.0})
    assert read_status(folder / f"{gone}-0.json") is None
    with pytest.raises(FoveateError, match="no process of this user runs a RuntimeManager"):
        find_status(folder)
    with pytest.raises(FoveateError, match=f"process {gone} runs a RuntimeManager"):
        find_status(folder, gone)
    with pytest.raises(FoveateError, match="no process"):
        find_status(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "[]", '{"pid": "x"}', "[" * 500 + "]" * 500, '{"pid": 1}'])
def test_what_is_no_status_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "1-0.json"
    file.write_text(text)
    with pytest.raises(FoveateError, match="is not a status file"):
        read_status(file)


def test_several_processes_must_be_told_apart(tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "run")
    write_status(folder / f"{os.getpid()}-0.json", _status())
    parent = os.getppid()
    (folder / f"{parent}-0.json").write_text(
        json.dumps({"pid": parent, "started": process_start(parent), "updated": 1.0})
    )
    with pytest.raises(FoveateError, match="give one of"):
        find_status(folder)
    assert find_status(folder, parent)["pid"] == parent
