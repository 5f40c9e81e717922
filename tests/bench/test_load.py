import pytest

from foveate.bench import load
from foveate.bench.fresh_process.run import run_in_fresh_process
from foveate.errors import FoveateError


def test_small_model_in_fresh_processes():
    pytest.importorskip("transformers")
    measured = load.measure(width=128, layers=1, times=1)
    wanted = {"bytes_read_b4_over_b8", "peak_memory_b4_over_b8", "resident_mixed_over_b8"}
    assert wanted <= set(measured.figures)
    assert 0.4 < measured.figures["bytes_read_b4_over_b8"] < 1
    assert [r["map"] for r in measured.rounds] == ["b4", "b8", "mixed"]


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(FoveateError, match="not a folder"):
        run_in_fresh_process("foveate.bench.fresh_process.load", str(tmp_path / "nothing"), str(tmp_path / "map"))
