import pytest

from foveate.bench import memory


def test_a_small_model_in_a_fresh_process():
    pytest.importorskip("transformers")
    measured = memory.measure(width=128, layers=1, seconds=0.2, rounds=1)
    wanted = {
        "memory_returned",
        "return_ms",
        "limit_held",
        "restore_ms",
        "restore_ratio",
        "disk_ratio",
        "streaming_ratio",
        "convert_ratio",
    }
    assert wanted <= set(measured.figures)
    assert measured.figures["memory_returned"] > 0
    assert 0 < measured.figures["convert_ratio"] < 2
    assert {r["what"] for r in measured.rounds} >= {"returned", "restored", "disk", "streamed"}
