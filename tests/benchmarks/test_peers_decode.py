"""Decoding beside llama.cpp, with a child of the test's in its place."""

import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.peers.environments import Environment
from benchmarks.peers.speed import decode
from foveate.bench.decode import Ours, Shape, Sizes

SHAPE = Shape(width=64, intermediate=96, layers=1, heads=2, kv_heads=1, vocabulary=128)
TINY = Sizes(shape=SHAPE, threads=1, prompt=4, tokens=3, prefill=16, rounds=2, compiled=False, read_bytes=1 << 20)
#: A script that speaks as `scripts/llama_model.py` does, and takes a second a token.
PEER = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    answer = {
        "prepare": lambda: {"bytes": {kind: 1000 for kind in request["types"]}},
        "load": lambda: {"system": "CPU : FAKE = 1 | ", "version": "0"},
        "decode": lambda: {"seconds": 1.0},
        "prefill": lambda: {"seconds": 2.0},
    }[request["do"]]()
    print(json.dumps(answer), flush=True)
"""

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _no_fresh_process(monkeypatch):
    monkeypatch.setattr(Ours, "memory", lambda self, level: {"weights": 4, "cache": 3, "activations": 1, "peak": 8})


def test_ours_alone_says_how_to_measure_the_other_side(monkeypatch):
    monkeypatch.setattr(Environment, "built", property(lambda self: False))
    measured = decode.measure(TINY)
    assert not any("ratio" in name for name in measured.figures)
    assert {"non_kernel_share", "peak_memory_over_computed", "model_bytes_b4"} <= set(measured.figures)
    assert "`make bench-peers`" in measured.notes[0]


def test_both_sides_are_compared_at_equal_bytes(monkeypatch, tmp_path):
    (tmp_path / "llama_model.py").write_text(PEER)
    monkeypatch.setattr(decode, "SCRIPTS", tmp_path)
    monkeypatch.setattr(Environment, "python", property(lambda self: Path(sys.executable)))
    figures = decode.measure(TINY).figures
    assert {f"tokens_ratio_b{b}" for b in (2, 3, 4, 6, 8)} | {"prefill16_ratio_b4"} <= set(figures)
    for bits, kind in decode.TYPES.items():
        assert figures[f"model_bytes_{kind}"] == 1000
        assert figures[f"tokens_per_second_{kind}"] == 1
        wanted = figures[f"tokens_per_second_b{bits}"] * figures[f"model_bytes_b{bits}"] / 1000
        assert figures[f"tokens_ratio_b{bits}"] == pytest.approx(wanted, rel=1e-6)
    assert figures["peak_memory_over_computed"] == 1


def test_a_peer_that_fails_is_a_note(monkeypatch, tmp_path):
    (tmp_path / "llama_model.py").write_text("raise RuntimeError('no such instruction')")
    monkeypatch.setattr(decode, "SCRIPTS", tmp_path)
    monkeypatch.setattr(Environment, "python", property(lambda self: Path(sys.executable)))
    notes = []
    with ExitStack() as stack:
        assert decode._llama_cpp(TINY, stack, notes) is None
    assert notes == ["ours only: llama.cpp ended with 1 on 'prepare': RuntimeError: no such instruction"]
