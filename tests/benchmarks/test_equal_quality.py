"""The comparison at equal quality: its pure parts, and a small model from end to end beside a peer of the test's."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate as fv
from benchmarks.peers.environments import Environment
from benchmarks.peers.equal_quality import compare
from benchmarks.peers.equal_quality.compare import Sizes, measure_subject
from benchmarks.peers.equal_quality.figures import figures
from benchmarks.peers.equal_quality.peer import tensor_name
from benchmarks.peers.equal_quality.plot import models, quality_plot, step_of
from benchmarks.peers.equal_quality.search import interpolated, smallest_within
from benchmarks.peers.equal_quality.subject import Subject, importance, windows
from foveate.errors import FoveateError
from report.test_page import Checked
from tiny import llama, tokens

LINE = [(3.0, 0.4), (4.0, 0.1), (6.0, 0.01)]


def exponential(size: float) -> float:
    return math.exp(-size)


def test_kl_is_interpolated_on_a_logarithmic_scale() -> None:
    assert interpolated(LINE, 0.2) == pytest.approx(3.5)
    assert interpolated(LINE[::-1], 0.1) == pytest.approx(4.0)
    assert interpolated(LINE, 0.1 / math.sqrt(10)) == pytest.approx(5.0)
    assert interpolated([(3.0, 0.1), (4.0, 0.1)], 0.1) == 4.0
    assert interpolated(LINE, 0.5) is interpolated(LINE, 0.001) is None


def test_the_smallest_size_within_a_kl_is_found_with_few_measurements() -> None:
    asked: list[float] = []

    def measure(size: float) -> float:
        asked.append(size)
        return exponential(size) * (1 + 0.02 * math.sin(9 * size))  # a frontier that is not a line

    found = smallest_within(measure, [(s, measure(s)) for s in (2.0, 4.0, 8.0)], 0.005)
    assert found is not None
    assert 0.97 * 0.005 <= found[1] <= 0.005
    assert found[0] == pytest.approx(-math.log(0.005), abs=0.06)
    assert len(asked) <= 3 + 3


def test_a_kl_outside_of_the_frontier() -> None:
    def never(size: float) -> float:
        raise AssertionError(size)

    assert smallest_within(never, LINE, 0.001) is None
    assert smallest_within(never, LINE, 0.5) == (3.0, 0.4)
    assert smallest_within(never, LINE, 0.1) == (4.0, 0.1)


def quality(side: str, name: str, kl: float, size: int, bits: float = 4.0) -> dict[str, Any]:
    return {"side": side, "name": name, "kl": kl, "bytes": size, "bits": bits}


def time(number: int, name: str, seconds: float, cached: int = 8) -> dict[str, Any]:
    return {"round": number, "name": name, "cached": cached, "seconds": seconds}


ROWS = [
    quality("theirs", "Q2_K", 0.4, 100),
    quality("theirs", "Q4_K_M", 0.04, 100),
    quality("ours", "4.25 bits", 0.1, 90),
    quality("ours", "at Q2_K", 0.39, 50, 2.9),
    quality("ours", "at Q4_K_M", 0.04, 72, 5.1),
    quality("ours", "uniform 3", 0.2, 40, 3.3),
    quality("ours", "uniform 8", 0.01, 150, 8.2),
    *(time(i, "Q2_K", 0.008 * i) for i in (1, 2, 3)),
    *(time(i, "at Q2_K", 0.004 * i) for i in (1, 2, 3)),
    *(time(i, "Q4_K_M", 0.009) for i in (1, 2)),
    *(time(i, "at Q4_K_M", 0.004) for i in (1, 2)),
    time(1, "4.25 bits", 0.004),
    time(1, "uniform 3", 0.002),
    time(1, "uniform 8", 0.006),
    time(1, "Q4_K_M", 0.01, cached=4096),
    time(1, "at Q4_K_M", 0.005, cached=4096),
]


def test_figures_are_geometric_means_over_types() -> None:
    found = figures(ROWS)
    assert found["tokens_at_equal_kl_Q2_K"] == pytest.approx(2.0)
    assert found["tokens_at_equal_kl"] == pytest.approx(math.sqrt(2.0 * 2.25))
    assert found["bytes_at_equal_kl"] == pytest.approx(math.sqrt(0.5 * 0.72))
    assert found["smol_tokens_ratio_b8_over_b3"] == pytest.approx(1 / 3)
    assert found["tokens_at_equal_kl_Q4_K_M_cached_4096"] == pytest.approx(2.0)
    assert found["kl_theirs_Q2_K"] == 0.4
    assert found["tokens_per_second_ours_4_25_bits"] == pytest.approx(250)


def test_a_type_that_ours_does_not_reach_leaves_no_mean() -> None:
    found = figures([r for r in ROWS if r["name"] != "at Q2_K"])
    assert {"tokens_at_equal_kl", "bytes_at_equal_kl", "tokens_at_equal_kl_Q2_K"}.isdisjoint(found)
    assert "tokens_at_equal_kl_Q4_K_M" in found
    assert figures([]) == {}


def test_the_plot_is_one_well_formed_file() -> None:
    checked = Checked(quality_plot(ROWS))
    assert checked.tags.count("circle") == 4  # uniform 3 is left out
    assert checked.tags.count("rect") == 2
    assert {"Q2_K", "Q4_K_M", "2.90", "llama.cpp", "foveate, bits a weight", "tokens a second"} <= set(checked.text)
    assert ("xmlns", "http://www.w3.org/2000/svg") in checked.attributes
    with pytest.raises(FoveateError, match="both sides"):
        models(ROWS[:5])


@pytest.mark.parametrize(("high", "step"), [(7.0, 1.0), (270.0, 50.0), (130.0, 20.0), (0.3, 0.05)])
def test_ticks_are_round(high: float, step: float) -> None:
    assert step_of(0.0, high) == pytest.approx(step)


def test_layers_have_llama_cpps_names() -> None:
    assert tensor_name("model.layers.12.mlp.down_proj") == "blk.12.ffn_down.weight"
    assert tensor_name("lm_head") is None


def test_windows_start_where_they_are_told(tmp_path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("ab" * 20)

    def tokenizer(text: str, **_: Any) -> Mapping[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    assert windows(tokenizer, file, 0.25, 2, 3).tolist() == [[97, 98, 97], [98, 97, 98]]


def test_importance_is_the_mean_square_of_inputs() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False))
    x_nTK = torch.randn(4, 5, 3)
    forward = model.forward
    model.forward = lambda ids, use_cache: forward(ids)  # type: ignore[method-assign]
    ((name, energy_K),) = importance(model, x_nTK)
    assert name == "0"
    # `numel` counts tokens, and these inputs have three numbers each
    torch.testing.assert_close(3 * energy_K, x_nTK.square().mean((0, 1)))


class Rounded:
    """A peer whose types are the float model with noise."""

    types: Sequence[str] = ("coarse", "fine")
    bytes: Mapping[str, int] = {"coarse": 10_000, "fine": 20_000}
    notes = ("a peer of the test's",)

    def __init__(self, reference: Any) -> None:
        self.reference = reference

    def logits(self, kind: str, ids_T: Tensor) -> Tensor:
        exact: Tensor = self.reference(ids_T[None], use_cache=False).logits[0]
        noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))
        return exact + {"coarse": 0.02, "fine": 0.01}[kind] * noise * exact.std()

    def decode(self, kind: str, prompt: int, tokens: int) -> float:
        return 1.0


@pytest.fixture(scope="module")
def small() -> Subject:
    pytest.importorskip("transformers")
    model = llama(max_position_embeddings=64)
    reference = copy.deepcopy(model)
    profile = fv.quantize(model, tokens(4, 32, 2), progress=False)
    held_out = torch.cat([batch["input_ids"] for batch in tokens(2, 16, 1, seed=5)])
    return Subject(reference, model, profile, held_out, held_out)


def test_a_small_model_from_end_to_end(small: Subject) -> None:
    sizes = Sizes(
        threads=1, bits=(3.5, 5.0), prompt=3, tokens=2, rounds=1, long=12, long_tokens=2, long_rounds=1,
        long_types=("fine",), compiled=False,
    )  # fmt: skip
    result = measure_subject(small, Rounded(small.reference), sizes)
    rows = {(r["name"]): r for r in result.rounds if "kl" in r}
    for kind in ("coarse", "fine"):
        assert 0 < rows[f"at {kind}"]["kl"] <= rows[kind]["kl"]
    names = {"tokens_at_equal_kl", "bytes_at_equal_kl", "smol_tokens_ratio_b8_over_b3"}
    assert names | {f"tokens_at_equal_kl_fine_cached_12{more}" for more in ("", "_packed")} <= set(result.figures)
    assert "a peer of the test's" in result.notes
    assert "circle" in quality_plot(result.rounds)


def test_what_is_missing_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.delenv("FOVEATE_DATA", raising=False)
    assert "FOVEATE_DATA is not set" in compare.measure().notes[0]
    monkeypatch.setenv("FOVEATE_DATA", str(tmp_path))
    monkeypatch.setattr(Environment, "built", property(lambda self: False))
    assert "smollm2, llama-cpp" in compare.measure(tmp_path).notes[0]
