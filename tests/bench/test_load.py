import json
from pathlib import Path

import pytest

from foveate.bench import load
from foveate.bench.fresh_process import load as one_load
from foveate.bench.fresh_process.run import run_in_fresh_process
from foveate.errors import FoveateError


def test_a_small_model_is_loaded_by_each_map(monkeypatch):
    pytest.importorskip("transformers")
    fresh = []

    def run(module, folder, plan):
        """The first load in a fresh process, as all are; the others here, where everything is imported."""
        if not fresh:
            fresh.append(run_in_fresh_process(module, folder, plan))
            return fresh[0]
        return json.loads(json.dumps(one_load.measure(Path(folder), Path(plan))))

    monkeypatch.setattr(load, "run_in_fresh_process", run)
    measured = load.measure(width=128, layers=1, times=1)
    wanted = {"bytes_read_b4_over_b8", "peak_memory_b4_over_b8", "resident_mixed_over_b8"}
    assert wanted <= set(measured.figures)
    assert 0.4 < measured.figures["bytes_read_b4_over_b8"] < 1
    assert measured.rounds[0].items() >= fresh[0].items()
    assert [r["map"] for r in measured.rounds] == ["b4", "b8", "mixed"]


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(FoveateError, match="not a folder"):
        run_in_fresh_process("foveate.bench.fresh_process.load", str(tmp_path / "nothing"), str(tmp_path / "map"))
