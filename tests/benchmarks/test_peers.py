"""The conversation with other environments, by children that speak the protocol and need none of the peers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers import environments
from benchmarks.peers.child import SCRIPTS, Child, PeerError
from benchmarks.peers.environments import ENVIRONMENTS, Environment, build
from benchmarks.peers.speed import linear_layers
from foveate.errors import FoveateError

PYTHON = Path(sys.executable)
ECHO = """
import sys
sys.path.insert(0, {scripts!r})
from answers import serve
def add(a, b):
    print("a library talks")
    return {{"sum": a + b}}
def fail():
    raise ValueError("no such layer")
def stop():
    import os
    os.kill(os.getpid(), 9)
def wait():
    import time
    time.sleep(60)
serve({{"add": add, "fail": fail, "stop": stop, "wait": wait}})
"""


@pytest.fixture
def script(tmp_path):
    file = tmp_path / "echo.py"
    file.write_text(ECHO.format(scripts=str(SCRIPTS)))
    return file


def test_a_child_answers_until_it_is_closed(script):
    with Child("echo", PYTHON, script) as child:
        assert child.ask("add", a=1, b=2) == {"sum": 3}
        assert child.ask("add", a="x", b="y") == {"sum": "xy"}
    assert child._process.poll() is not None
    child.close()  # once more is no error


def test_a_failure_is_told_in_its_own_words(script):
    with Child("echo", PYTHON, script) as child:
        with pytest.raises(PeerError, match=r"echo ended with 1 on 'fail': ValueError: no such layer"):
            child.ask("fail")
        with pytest.raises(PeerError, match="ended with 1 on 'add'"):
            child.ask("add", a=1, b=2)


def test_a_killed_child_is_told(script):
    with Child("echo", PYTHON, script) as child, pytest.raises(PeerError, match=r"ended with -9 on 'stop': nothing"):
        child.ask("stop")


def test_a_child_that_does_not_answer_in_time_is_ended(script):
    with Child("echo", PYTHON, script, limit=0.5) as child:
        with pytest.raises(PeerError, match=r"did not answer 'wait' within 0.5 s"):
            child.ask("wait")
        assert child._process.wait() != 0


@pytest.mark.parametrize("answer", ["[1, 2]", "Loading model...", "{"])
def test_what_is_no_answer_is_told(tmp_path, answer):
    file = tmp_path / "odd.py"
    file.write_text(f"import sys\nsys.stdin.readline()\nprint({answer!r}, flush=True)\nsys.stdin.readline()\n")
    with Child("odd", PYTHON, file) as child, pytest.raises(PeerError, match="not with a JSON object"):
        child.ask("add")


def test_a_python_that_is_not_there_is_told(tmp_path, script):
    with pytest.raises(PeerError, match="could not be started"):
        Child("echo", tmp_path / "python", script)


def test_scripts_import_nothing_of_ours():
    scripts = list(SCRIPTS.glob("*.py"))
    assert len(scripts) > 4
    for file in scripts:
        assert "import foveate" not in file.read_text()
        assert "from foveate" not in file.read_text()


def test_an_environment_is_named_by_what_it_holds():
    one = Environment("x", ("a==1",))
    assert one.folder != Environment("x", ("a==2",)).folder
    assert one.folder != Environment("x", ("a==1",), variables=(("CMAKE_ARGS", "-DX"),)).folder
    assert one.folder == Environment("x", ("a==1",)).folder
    for environment in ENVIRONMENTS.values():
        assert all("==" in r for r in environment.requirements)
    assert set(linear_layers.FORMS) <= {None, *ENVIRONMENTS}


def _fake_steps(monkeypatch, tmp_path, code):
    """Let the steps of a build run `code`, with the folder that is to become the environment in argv."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(environments, "_steps", lambda environment, new: [[sys.executable, "-c", code, str(new)]])


MAKE = (
    "import os, pathlib, sys; p = pathlib.Path(sys.argv[1]) / os.environ['PLACE']; p.parent.mkdir(parents=True);"
    "p.write_text('python'); print('made')"
)


def test_an_environment_is_there_when_it_is_whole(monkeypatch, tmp_path):
    _fake_steps(monkeypatch, tmp_path, MAKE)
    wanted = Environment(
        "x", ("a==1",), variables=(("PLACE", "bin/python" if os.name != "nt" else "Scripts/python.exe"),)
    )
    assert not wanted.built
    build(wanted)
    assert wanted.built
    assert not list(wanted.folder.parent.glob("build-*"))
    build(wanted)  # again is nothing


def test_a_build_that_fails_leaves_its_log_and_no_environment(monkeypatch, tmp_path):
    _fake_steps(monkeypatch, tmp_path, "import sys; print('no wheel of a'); sys.exit(1)")
    wanted = Environment("x", ("a==1",))
    with pytest.raises(
        FoveateError, match=r"environment of x could not be built: no wheel of a \(all of it: .*x-.*log"
    ):
        build(wanted)
    assert not wanted.built
    assert not list(wanted.folder.parent.glob("build-*"))


def test_the_steps_of_a_build_are_venv_and_pip(tmp_path):
    venv, pip = environments._steps(ENVIRONMENTS["llama-cpp"], tmp_path)
    assert venv[1:] == ["-m", "venv", str(tmp_path)]
    assert pip[:4] == [str(tmp_path / "bin" / "python"), "-m", "pip", "install"]
    assert "--no-binary" in pip
    assert "--no-binary" not in environments._steps(ENVIRONMENTS["hqq"], tmp_path)[1]


TINY = linear_layers.Sizes(width=64, rows=(1, 4), threads=1, set_bytes=1 << 15, rounds=2, many=4)


def test_figures_of_ours_and_of_torch_itself():
    measured = linear_layers.measure(TINY, {None: ("torch float32", "torch bfloat16")})
    assert {f"time_over_torch_{d}_m{m}" for d in ("float32", "bfloat16") for m in (1, 4)} <= set(measured.figures)
    assert {"share_torch_float32", "share_foveate_2", "share_foveate_8"} <= set(measured.figures)
    assert all(value > 0 for value in measured.figures.values())
    assert {r["round"] for r in measured.rounds} == {1, 2}
    assert {r["form"] for r in measured.rounds if r["bits"] == 32} == {"torch float32"}
    assert all(r["bytes"] == 64 * 64 * 4 for r in measured.rounds if r["bits"] == 32)
    assert json.dumps(measured.rounds)
    assert any("torch float32: 2." in note for note in measured.notes)


def test_a_peer_without_an_environment_or_that_fails_is_a_note(monkeypatch):
    monkeypatch.setattr(Environment, "built", property(lambda self: False))
    monkeypatch.setattr(linear_layers, "Ours", _NoLayers)
    measured = linear_layers.measure(TINY, {"hqq": ("hqq 4",), None: ("torch int5",)})
    missing, failed = measured.notes
    assert missing == "hqq 4: not measured, for there is no environment for it: `make bench-peers` makes it"
    assert failed.startswith("torch int5: not measured: torch int5 ended with 1 on 'make': KeyError: 'torch int5'")
    assert not any(name.startswith("time_over") for name in measured.figures)


class _NoLayers:
    def __init__(self, sizes):
        pass

    def bytes_each(self, level):
        return level

    def seconds(self, level, rows, set_bytes, passes):
        return 1e-6


def test_the_command_that_makes_them_goes_on_after_a_failure(monkeypatch, tmp_path, caplog):
    from benchmarks.peers.__main__ import main

    _fake_steps(monkeypatch, tmp_path, "import sys; sys.exit('nothing to install from')")
    assert main([]) == 1
    said = caplog.text
    assert all(
        f"the environment of {name} could not be built: nothing to install from" in said for name in ENVIRONMENTS
    )


def test_only_what_is_named_is_built(monkeypatch, tmp_path, caplog):
    from benchmarks.peers.__main__ import main

    _fake_steps(monkeypatch, tmp_path, "pass")
    assert main(["nobody"]) == 1
    assert "'nobody' is not one of" in caplog.text
    name = next(iter(ENVIRONMENTS))
    main([name])
    assert [e for e in ENVIRONMENTS.values() if e.built] in ([], [ENVIRONMENTS[name]])


def test_a_script_is_a_program_of_its_own():
    """Without foveate on the path, and with what its library needs only when that form is asked for."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import answers"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
