"""Decoding beside llama.cpp, with a child of the test's in its place."""

import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.peers.environments import Environment
from benchmarks.peers.speed import decode
from foveate.bench.decode import Ours, Shape, Sizes

SHAPE = Shape(width=64, intermediate=96, layers=1, heads=2, kv_heads=1, vocabulary=128)
TINY = Sizes(
    shape=SHAPE, threads=1, prompt=4, tokens=3, prefill=16, batch=2, rounds=2, compiled=False, read_bytes=1 << 20
)
#: A script that speaks as `scripts/llama_model.py` and `scripts/ik_model.py` do, and takes a second a token.
PEER = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    answer = {
        "prepare": lambda: {"bytes": dict.fromkeys(request["types"], 1000), "files": {k: k for k in request["types"]}},
        "use": lambda: {},
        "load": lambda: {"system": "CPU : FAKE = 1 | ", "version": "0"},
        "decode": lambda: {"seconds": float(request["sequences"])},
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
    for name in ("llama_model.py", "ik_model.py"):
        (tmp_path / name).write_text(PEER)
    monkeypatch.setattr(decode, "SCRIPTS", tmp_path)
    monkeypatch.setattr(Environment, "built", property(lambda self: True))
    monkeypatch.setattr(Environment, "python", property(lambda self: Path(sys.executable)))
    figures = decode.measure(TINY).figures
    assert {"prefill16_ratio_b4", "ik_prefill_ratio"} <= set(figures)
    for start in ("", "ik_"):
        for bits, kind in decode.TYPES.items():
            assert figures[f"model_bytes_{start}{kind}"] == 1000
            assert figures[f"tokens_per_second_{start}{kind}"] == 1
            wanted = figures[f"tokens_per_second_b{bits}"] * figures[f"model_bytes_b{bits}"] / 1000
            assert figures[f"{start}tokens_ratio_b{bits}"] == pytest.approx(wanted, rel=1e-6)
        # two sequences take two seconds a step
        assert figures[f"batch2_tokens_per_second_{start}Q4_K_S"] == 1
        assert figures[f"{start}batch2_ratio_b4"] == pytest.approx(figures["batch2_tokens_per_second_b4"], rel=1e-6)
    assert figures["peak_memory_over_computed"] == 1


def test_a_peer_that_fails_is_a_note(monkeypatch, tmp_path):
    broken = "raise RuntimeError('no such instruction')"
    (tmp_path / "llama_model.py").write_text(PEER)
    (tmp_path / "ik_model.py").write_text(broken)
    monkeypatch.setattr(decode, "SCRIPTS", tmp_path)
    monkeypatch.setattr(Environment, "built", property(lambda self: True))
    monkeypatch.setattr(Environment, "python", property(lambda self: Path(sys.executable)))
    notes = []
    with ExitStack() as stack:
        assert list(decode._peers(TINY, stack, notes)) == [""]
        assert notes == ["no ik_llama.cpp: ik_llama.cpp ended with 1 on 'use': RuntimeError: no such instruction"]
        (tmp_path / "llama_model.py").write_text(broken)
        assert not decode._peers(TINY, stack, notes)
    assert notes[1] == "ours only: llama.cpp ended with 1 on 'prepare': RuntimeError: no such instruction"
