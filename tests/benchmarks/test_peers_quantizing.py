"""What quantizing takes beside peers: figures, notes, and the scripts' own parts, without any of the peers."""

from __future__ import annotations

import ctypes
import json
import sys
import types
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.peers.child import SCRIPTS, PeerError
from benchmarks.peers.environments import ENVIRONMENTS, Environment
from benchmarks.peers.quantizing import compare, recipes
from benchmarks.peers.quantizing.compare import Forward, figures_of, measure, note_of
from benchmarks.peers.quantizing.recipes import RECIPES, Recipe, Taken, Work, take
from foveate.bench.shared.result import Measured
from foveate.errors import FoveateError

GPTQ, AUTO_ROUND, LLAMA = RECIPES
TAKEN = Taken(seconds=20.0, seconds_cpu=30.0, peak=600.0, parts={"importance": 15.0, "rounding": 5.0}, said="1.2")
#: Scripts that speak as ours do, and answer with what they were asked.
STUB = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    do = request.pop("do")
    if request.get("bits") == 0:
        raise ValueError("no codes of no bits")
    if "out" in request:
        open(request["out"], "a").write(do)
    seconds = {"quantize": 2.0, "importance": 3.0, "widen": 9.0}[do]
    sizes = {"seconds": seconds, "seconds_cpu": 2 * seconds, "peak": 100 * seconds}
    about = {"version": "1.2.3", "dtype": "torch.bfloat16", "system": "CPU : FAKE = 1 | "}
    print(json.dumps({**sizes, **about, "request": request}), flush=True)
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    """A model that nobody reads, environments that exist, and scripts of the test's."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    for name in ("quantize_model.py", "quantize_gguf.py"):
        (scripts / name).write_text(STUB)
    monkeypatch.setattr(recipes, "SCRIPTS", scripts)
    monkeypatch.setattr(Environment, "built", property(lambda self: True))
    monkeypatch.setattr(Environment, "python", property(lambda self: Path(sys.executable)))
    monkeypatch.setattr(recipes, "spread_tokens", lambda sizes, count, words: torch.arange(count) % words)
    text = tmp_path / "text.txt"
    text.write_text("a text")
    return Work(model=tmp_path, source=tmp_path / "model.gguf", text=text, folder=tmp_path, threads=2, words=7)


def test_figures_are_over_the_forward_passes_before_and_after() -> None:
    unit = 1 / compare.TOKENS  # a second a pass
    found = figures_of("x", TAKEN, 1024, (Forward(4 * unit, 8 * unit), Forward(6 * unit, 12 * unit)), 300)
    assert found == pytest.approx(
        {
            "x_over_forward": 4.0,
            "x_over_forward_cpu": 3.0,
            "x_importance_over_forward": 3.0,
            "x_rounding_over_forward": 1.0,
            "x_peak_over_model": 2.0,
            "x_tokens": 1024,
        }
    )


def test_a_note_has_the_settings_and_what_they_took() -> None:
    said = note_of(LLAMA, TAKEN, 36)
    assert said.startswith("llama_cpp (1.2): an importance matrix")
    assert said.endswith("36 windows of 512 tokens, 20.0 s, importance 15.0, rounding 5.0, 600 B")


def test_recipes_name_environments_that_exist_and_figures_apart() -> None:
    assert {recipe.environment for recipe in RECIPES} <= set(ENVIRONMENTS)
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES)
    assert all(recipe.name.isidentifier() for recipe in RECIPES)


def test_a_transformer_is_quantized_with_the_librarys_own_settings(work: Work) -> None:
    taken = take(GPTQ, work, 3)
    assert (taken.seconds, taken.seconds_cpu, taken.peak) == (2.0, 4.0, 200.0)
    assert taken.said == "1.2.3, computed in bfloat16"
    held = np.load(work.folder / "gptqmodel.npy")
    assert held.shape == (3, GPTQ.width)
    assert held.dtype == np.int64


def test_llama_cpps_two_tools_are_added_up_and_its_conversion_is_not(work: Work) -> None:
    taken = take(LLAMA, work, 2)
    assert (taken.seconds, taken.seconds_cpu, taken.peak) == (5.0, 10.0, 300.0)
    assert taken.parts == {"importance": 3.0, "rounding": 2.0}
    assert "CPU : FAKE = 1" in taken.said
    assert (work.folder / "float16.gguf").read_text() == "widen"


def test_a_peer_that_is_not_there_or_fails_says_so(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PeerError, match="gptqmodel ended with 1 on 'quantize': ValueError: no codes of no bits"):
        take(replace(GPTQ, settings={"bits": 0}), work, 1)
    monkeypatch.setattr(Environment, "built", property(lambda self: False))
    with pytest.raises(PeerError, match=r"`python -m benchmarks.peers auto-round` makes it"):
        take(AUTO_ROUND, work, 1)


def _ours(sizes: Any) -> Measured:
    figures = dict.fromkeys(compare._FIGURES, 2.0)
    return Measured(figures, ({"batches": 36, "model_bytes": 300},), ("seconds: few", "the machine was quiet"))


def test_all_sides_are_compared_and_a_failure_is_a_note(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, int] = {}

    def taking(recipe: Recipe, work: Work, windows: int) -> Taken:
        asked[recipe.name] = windows
        if recipe is AUTO_ROUND:
            raise PeerError("no compiler")
        return TAKEN

    units = iter(Forward(unit, unit) for unit in (1.0, 2.0, 3.0))
    monkeypatch.setattr(compare, "take", taking)
    monkeypatch.setattr(compare.calibrate, "measure", _ours)
    monkeypatch.setattr(compare, "_forward", lambda sizes: next(units))
    measured = compare.compare(work, RECIPES)
    assert asked == {"gptqmodel": 128, "auto_round": 128, "llama_cpp": 36}
    assert measured.figures["foveate_over_forward"] == 2.0
    assert measured.figures["llama_cpp_over_forward"] == pytest.approx(20.0 / compare.TOKENS / 2.5)
    assert measured.figures["llama_cpp_tokens"] == 36 * 512
    assert not any(name.startswith("auto_round") for name in measured.figures)
    assert measured.notes[:1] == ["foveate: seconds: few"]
    assert "auto_round: not measured: no compiler" in measured.notes
    assert [row["side"] for row in measured.rounds] == ["foveate", "gptqmodel", "llama_cpp"]
    assert json.dumps(measured.rounds)


def test_without_data_or_the_model_there_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"peer \(='quanto'\) is not one of gptqmodel, auto_round, llama_cpp"):
        measure(peers=["quanto"])
    monkeypatch.delenv("FOVEATE_DATA", raising=False)
    assert measure().notes[0].startswith("skipped: FOVEATE_DATA is not set")
    monkeypatch.setenv("FOVEATE_DATA", str(tmp_path))
    monkeypatch.setattr(Environment, "built", property(lambda self: False))
    assert measure().notes == ("skipped: `python -m benchmarks.peers smollm2` makes its environment",)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts as modules, with a stand-in for the libraries that they import."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
    library = types.SimpleNamespace(
        llama_cpp=types.SimpleNamespace(ggml_backend_sched_eval_callback=callback), __file__="nowhere"
    )
    monkeypatch.setitem(sys.modules, "llama_cpp", library)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "gguf", types.ModuleType("gguf"))
    for name in ("quantize_gguf", "llama_model", "llama_engine", "meter", "answers"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("scripts")
def test_the_importance_matrix_is_the_mean_square_of_every_products_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = import_module("quantize_gguf")
    monkeypatch.setattr(gguf, "_operation", {1: b"MUL_MAT", 2: b"ADD"}.__getitem__)
    x_MK = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)

    def product(weight: str, x_MK: Any, op: int = 1, kind: int = 0) -> Any:
        inputs = gguf.Tensor(type=kind, data=x_MK.ctypes.data)
        inputs.ne[:] = (x_MK.shape[1], x_MK.shape[0], 1, 1)
        inputs.nb[:] = (4, x_MK.strides[0], x_MK.nbytes, x_MK.nbytes)
        made = gguf.Tensor(op=op)
        made.src[0] = ctypes.pointer(gguf.Tensor(name=weight.encode()))
        made.src[1] = ctypes.pointer(inputs)
        return made

    seen = gguf.Importance()

    def run(tensor: Any) -> bool:
        wanted = bool(seen.callback(ctypes.addressof(tensor), True, None))
        if wanted:
            assert seen.callback(ctypes.addressof(tensor), False, None)
        return wanted

    assert run(product("blk.0.ffn_up.weight", x_MK[:24]))
    assert run(product("blk.0.ffn_up.weight", x_MK[24:]))
    assert run(product("blk.1.ffn_up.weight", x_MK[:, :5]))  # a part of each row
    assert not run(product("blk.0.ffn_up.weight", x_MK[:8]))
    assert not run(product("output.weight", x_MK))
    assert not run(product("blk.0.ffn_up.weight", x_MK, op=2))
    assert not run(product("blk.0.ffn_up.weight", x_MK, kind=1))
    means = seen.means()
    np.testing.assert_allclose(means["blk.0.ffn_up.weight"], np.square(x_MK).mean(0), rtol=1e-5)
    np.testing.assert_allclose(means["blk.1.ffn_up.weight"], np.square(x_MK[:, :5]).mean(0), rtol=1e-5)
    assert seen.rows == {"blk.0.ffn_up.weight": 40, "blk.1.ffn_up.weight": 40}


@pytest.mark.usefixtures("scripts")
def test_a_meter_counts_time_and_the_highest_memory_of_its_work() -> None:
    meter = import_module("meter").Meter()
    with meter.work():
        held = bytearray(b"1" * (64 << 20))
        del held
    first = meter.answer()
    assert first["seconds"] > 0
    assert first["peak"] > 60 << 20
    with meter.work():
        pass
    assert meter.answer()["seconds"] > first["seconds"]
    assert meter.answer()["peak"] == first["peak"]
