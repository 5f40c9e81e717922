"""The benchmark of quantizing, on a model of two layers."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from typer.testing import CliRunner

from foveate.bench.calibrate import Calibrated, measure
from foveate.bench.fresh_process.run import run_in_fresh_process
from foveate.cli.app import app
from foveate.errors import DataError


def test_a_small_model_in_a_fresh_process() -> None:
    pytest.importorskip("transformers")
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    measured = measure(Calibrated(windows=3, length=32, shape=(*shape.items(), ("vocab_size", 80))))
    figures = measured.figures
    assert figures["tokens"] == 96
    parts = ("passes_over_forward", "rounding_over_forward", "comparing_over_forward")
    assert 0 < sum(figures[part] for part in parts) < figures["calibrate_over_forward"]
    assert 0 < figures["statistics_over_forward"] < figures["passes_over_forward"]
    assert figures["peak_over_model"] > 0
    assert any(note.startswith("a sample: calibration needs 16384 tokens") for note in measured.notes)


def test_the_unit_is_measured_alone_in_a_fresh_process() -> None:
    pytest.importorskip("transformers")
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = Calibrated(length=32, shape=(*shape.items(), ("vocab_size", 80)))
    found = run_in_fresh_process("foveate.bench.fresh_process.forward", json.dumps(asdict(sizes)))
    assert set(found) == {"token", "token_cpu"}
    assert all(0 < seconds < 1 for seconds in found.values())


@pytest.mark.parametrize(
    ("wrong", "why"),
    [({"windows": 0}, "not at least 1"), ({"length": 1}, "not at least 2"), ({"data": "/nothing"}, "not a file")],
)
def test_sizes_check_themselves(wrong: dict[str, object], why: str) -> None:
    with pytest.raises(DataError, match=why):
        Calibrated(**wrong)  # type: ignore[arg-type]


def test_its_options_are_for_no_other_benchmark() -> None:
    done = CliRunner().invoke(app, ["bench", "switch", "--windows", "3"])
    assert done.exit_code != 0
