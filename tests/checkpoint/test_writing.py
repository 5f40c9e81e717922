"""A folder is written as a whole or not at all, whatever interrupts the writing."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import foveate as fv
from folders import X, at, copy_of, skeleton
from foveate.checkpoint import files as checkpoint_files
from foveate.errors import CheckpointError
from foveate.files import LOCK
from tiny import quantized_llama, tokens


@pytest.mark.parametrize("after", range(11))
def test_a_write_that_fails_leaves_what_was_there(
    saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    folder, model, profile = saved
    old = copy_of(folder, tmp_path / "old")
    fv.save_map(old, profile.uniform(3))
    before = {f.name: f.read_bytes() for f in old.iterdir()}
    calls = 0
    commit = checkpoint_files.commit

    def full(temporary: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(28, "No space left on device")
        commit(temporary, target)

    monkeypatch.setattr(checkpoint_files, "commit", full)
    plan = profile.uniform(4)
    if after >= 9:  # eight files and the head
        fv.save(model, old, keep=plan)
        return
    with pytest.raises(CheckpointError, match="No space left on device"):
        fv.save(model, old, keep=plan)
    assert {f.name: f.read_bytes() for f in old.iterdir()} == before
    with pytest.raises(CheckpointError, match="No space left on device"):
        fv.save(model, tmp_path / "new", keep=plan)
    assert not (tmp_path / "new").exists()


_FULL_DISK = """
    import resource, sys
    import torch
    sys.path.insert(0, sys.argv[1])
    from tiny import quantized_mlp
    import foveate as fv
    model, _ = quantized_mlp()
    for limit in map(int, sys.argv[3:]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            fv.save(model, f"{sys.argv[2]}{limit}")
        except fv.CheckpointError as error:
            print(error)
"""


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    done = _python(_FULL_DISK, tmp_path / "out", 100, 2000)
    assert done.returncode == 0, done.stderr
    assert [line.startswith("cannot write") for line in done.stdout.splitlines()] == [True, True], done.stdout
    assert not list(tmp_path.iterdir())


def _python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), str(Path(__file__).parents[1]), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_folder_that_cannot_be_written(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    _, model, _ = saved
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot write"):
        fv.save(model, tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot write"):
        fv.save(model, tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"
    folder = tmp_path / "read-only"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(CheckpointError, match="cannot write"):
        fv.save(model, folder)


# one process has everything imported, and forks one that saves for each line that it reads
_SAVE_FOR_EVER = """
    import os, sys
    sys.path.insert(0, sys.argv[1])
    import torch
    from tiny import mlp
    import foveate as fv
    torch.set_num_threads(1)
    model = fv.load(sys.argv[3], model=mlp())
    profile = fv.profile_of(model)
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            print("ready", os.getpid(), flush=True)
            while True:
                for level in (4, 8):
                    fv.save(model, sys.argv[2], keep=profile.uniform(level))
        _, status = os.waitpid(child, 0)
        print("ended by", os.WTERMSIG(status), flush=True)
"""


def test_kill_9_while_saving_over_a_checkpoint(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    source, model, profile = saved
    folder = tmp_path / "model"
    fv.save(model, folder, keep=profile.uniform(4))
    expected = {level: at(model, profile.uniform(level)) for level in (4, 8)}
    choice = random.Random(0)
    command = [sys.executable, "-c", textwrap.dedent(_SAVE_FOR_EVER), str(Path(__file__).parents[1]), folder, source]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        for _ in range(3):
            parent.stdin.write("another\n")
            parent.stdin.flush()
            word, child = parent.stdout.readline().split()
            assert word == "ready"
            time.sleep(choice.uniform(0.0, 0.2))
            os.kill(int(child), signal.SIGKILL)
            assert parent.stdout.readline() == f"ended by {signal.SIGKILL.value}\n"
            loaded = fv.load(folder, model=skeleton())
            level = fv.current_map(loaded).levels["0:weight"]
            with torch.no_grad():
                assert torch.equal(loaded(X), expected[level])  # type: ignore[index]
        parent.stdin.close()
    # and the next save clears up
    fv.save(model, folder)
    assert {f.name for f in folder.iterdir()} == {LOCK, "foveate.json", *fv.read_head(folder).files.values()}


def test_a_kill_between_any_two_files(
    saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that stops dead cleans up nothing: as if `commit` never returned."""

    class Dead(BaseException):
        pass

    old, _ = quantized_llama()
    new, _ = quantized_llama(hidden_size=64, num_hidden_layers=1)
    commit = checkpoint_files.commit
    expected = old(**tokens()[0]).logits
    for after in range(20):
        folder = tmp_path / str(after)
        fv.save(old, folder)
        calls = 0

        def stop(temporary: Path, target: Path) -> None:
            nonlocal calls
            calls += 1
            if calls > after:  # noqa: B023
                raise Dead
            commit(temporary, target)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_files, "commit", stop)
            try:
                fv.save(new, folder)
            except Dead:
                assert torch.equal(fv.load(folder)(**tokens()[0]).logits, expected)
                continue
        assert fv.load(folder).config.hidden_size == 64  # type: ignore[union-attr]
        return
    pytest.fail("saving never ended")


def test_the_files_are_plain_safetensors(saved: tuple[Path, nn.Module, fv.Profile]) -> None:
    folder, model, _ = saved
    head = fv.read_head(folder)
    with safe_open(folder / head.files["plane0"], "pt") as tensors:
        assert sorted(tensors.keys()) == ["0:weight", "2:weight", "4:weight"]
        assert torch.equal(tensors.get_tensor("0:weight"), model[0].weight.plane0)  # type: ignore[index]
    data = json.loads((folder / "foveate.json").read_bytes())
    assert (data["format"], data["version"], data["features"]) == ("foveate", 2, ["runs"])
    assert head.written_by.startswith("foveate ")
    assert head.dtype == {"0:weight": "float32", "2:weight": "float32", "4:weight": "float32"}
