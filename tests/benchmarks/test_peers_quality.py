"""Quality against peers, with a peer that is a script run by this Python."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.models.cases import Case
from benchmarks.peers.child import SCRIPTS, PeerError
from benchmarks.peers.environments import ENVIRONMENTS
from benchmarks.peers.quality import compare, rounded
from benchmarks.peers.quality.figures import best_peers, figures, geometric_mean
from benchmarks.peers.quality.layers import gather, round_embeddings, set_weights
from benchmarks.peers.quality.rounded import Peers, Work
from benchmarks.peers.quality.settings import POINTS, SETTINGS, STAND_IN, Setting
from foveate.collect.kinds import weight_matrix
from foveate.collect.objectives import Logits

sys.path.insert(0, str(SCRIPTS))
import round_matrices

STUB = """
import sys
sys.path.insert(0, {scripts!r})
import numpy as np
import round_matrices
from answers import serve

def nearest(w_NK, moment_KK, bits, group):
    assert moment_KK.shape == (w_NK.shape[1],) * 2
    step = np.abs(w_NK).max(1, keepdims=True) / 2 ** (bits - 1) + 1e-9
    dense = (np.clip(np.floor(w_NK / step), -2 ** (bits - 1), 2 ** (bits - 1) - 1) + 0.5) * step
    return dense.astype(np.float32), round_matrices.packed(bits, w_NK.size) + 2 * w_NK.shape[0]

def broken(w_NK, moment_KK, **settings):
    raise ValueError("no kernel for this")

def crooked(w_NK, moment_KK, **settings):
    return w_NK.T, 1

def version(package):
    return "1.2.3"

round_matrices.metadata.version = version
round_matrices.FORMS.update({{"nearest": (nearest, "x"), "broken": (broken, "x"), "crooked": (crooked, "x")}})
serve({{"round": round_matrices.round_all}})
"""


@dataclass(frozen=True)
class StubSetting(Setting):
    """An setting whose script is the test's."""

    file: str = ""

    @property
    def script(self) -> str:
        return self.file


class Model(nn.Module):
    """An embedding tied to a head, two layers between, and one whose output nobody takes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.up, self.down, self.idle = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 8)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight
        with torch.no_grad():  # a divergence at 4 bits that float32 can tell from that at 8
            self.down.weight *= 8

    def forward(self, ids):
        x = self.embed(ids)
        self.idle(x)
        return self.head(x + self.down(torch.relu(self.up(x))))


def tiny_case() -> Case:
    torch.manual_seed(0)
    model = Model().eval()
    ids = list(torch.randint(0, 40, (4, 4, 16)))
    return Case("tiny", model, ids, ids, Logits(), "loss", lambda y, _: y[..., 0] * 0, "token")


@pytest.fixture
def stub(tmp_path, monkeypatch):
    file = tmp_path / "stub.py"
    file.write_text(STUB.format(scripts=str(SCRIPTS)))
    monkeypatch.setattr(Peers, "_python", lambda self, setting: Path(sys.executable))

    def setting(peer="nearest", point="b4_25", bits=4):
        return StubSetting(peer, "hqq", point, {"bits": bits, "group": 64}, file=str(file))

    return setting


@pytest.fixture
def work(tmp_path):
    case = tiny_case()
    compared = round_embeddings(case.model)
    return Work(tmp_path, case, case.model, gather(case.model, compared, case.calibration, case.objective))


def test_a_peer_hands_back_matrices_and_bytes(stub, work):
    with Peers() as peers:
        dense, size = peers.round(stub(), work)
        assert peers.versions() == ["nearest 1.2.3"]
    assert set(dense) == {"up", "down"}
    assert all(dense[name].shape == w_NK.shape for name, w_NK in work.layers.weights.items())
    assert 0 < float((dense["up"] - work.layers.weights["up"]).norm() / work.layers.weights["up"].norm()) < 0.1
    assert size == 2 * (32 * 64 * 4 // 8) + 2 * (64 + 32)


def test_a_peer_that_fails_is_told_and_the_next_setting_is_tried(stub, work):
    with Peers() as peers:
        with pytest.raises(PeerError, match="ValueError: no kernel for this"):
            peers.round(stub("broken"), work)
        with pytest.raises(PeerError, match=r"did not come back as a finite matrix of shape \(64, 32\)"):
            peers.round(stub("crooked"), work)
        peers.round(stub(), work)


def test_a_peer_without_an_environment_and_one_for_transformers_only(work, monkeypatch):
    monkeypatch.setattr(type(ENVIRONMENTS["hqq"]), "built", property(lambda self: False))
    with Peers() as peers:
        with pytest.raises(PeerError, match="no environment for it: `make bench-peers` makes it"):
            peers.round(SETTINGS[0], work)
        with pytest.raises(PeerError, match="takes transformers only"):
            peers.round(next(s for s in SETTINGS if s.whole), work)


def test_tokens_of_batches_and_of_chunks():
    ids = torch.ones(2, 3, dtype=torch.long)
    chunk = {"input_ids": ids, "attention_mask": ids * 0}
    (plain, ones), (chunked, mask) = rounded._tokens([ids, {"chunks": [chunk]}])
    assert plain is ids
    assert bool(ones.all())
    assert chunked is ids
    assert not bool(mask.any())
    with pytest.raises(PeerError, match="batches of tokens, and these are of tuple"):
        rounded._tokens([(ids,)])


def test_what_is_compared_and_the_moments_of_its_inputs():
    case = tiny_case()
    before = case.model.embed.weight.detach().clone()
    compared = round_embeddings(case.model)
    assert [f.names[0] for f in compared] == ["up", "down", "idle"]
    assert case.model.head.weight is case.model.embed.weight
    apart = float((case.model.embed.weight.detach() - before).norm() / before.norm())
    assert 0 < apart < 0.02
    layers = gather(case.model, compared, case.calibration, case.objective)
    assert layers.left == ("idle",)
    assert layers.count == 2 * 32 * 64
    x_MK = torch.cat([case.model.embed(ids).flatten(0, -2) for ids in case.calibration]).detach()
    torch.testing.assert_close(layers.moments["up"], x_MK.t() @ x_MK / len(x_MK))


def test_convolutions_are_matrices_of_patches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, groups=8))
    images = [torch.randn(2, 3, 6, 6)]
    layers = gather(model, round_embeddings(model), images, Logits())
    assert layers.left == ("1",)  # not one matrix for all of its inputs
    w_NK, moment_KK = layers.weights["0"], layers.moments["0"]
    energy = model[0](images[0]).square().mean((0, 2, 3))
    torch.testing.assert_close(torch.einsum("nk,kl,nl->n", w_NK, moment_KK, w_NK), energy)
    set_weights(model, {"0": w_NK * 2})
    torch.testing.assert_close(weight_matrix(model[0]), w_NK * 2)


def test_ours_takes_at_most_the_bytes_of_a_peer(stub):
    settings = [stub(), stub(point="b3_25", bits=3), stub("broken"), stub(point="b2_5", bits=6)]
    measured = compare.measure_cases([tiny_case()], settings)
    rows = [r for r in measured.rounds if "peer" in r]
    assert [r["point"] for r in rows] == ["b4_25", "b3_25"]
    for row in rows:
        assert 0.9 * row["bytes"] < row["ours_bytes"] <= row["bytes"]
        assert row["bits"] == 8 * row["bytes"] / 4096
        assert row["ratio"] == pytest.approx(row["ours_divergence"] / row["divergence"])
        assert row["ours_divergence"] > 0
    assert any("broken" in note and "no kernel for this" in note for note in measured.notes)
    assert any("left out: 6.38 bits here, not about 2.5" in note for note in measured.notes)
    assert (
        "tiny: idle is left float on both sides: the output does not depend on it, or it is grouped" in measured.notes
    )
    maps = {r["map"]: r for r in measured.rounds if "map" in r}
    assert {f"uniform {b}" for b in (2, 3, 4, 6, 8)} | {"one level 4", "one level 3"} <= set(maps)
    assert maps["uniform 8"]["divergence"] < maps["uniform 4"]["divergence"] < maps["uniform 2"]["divergence"]
    for point, bits in POINTS.items():
        assert maps[f"allocated {point}"]["bits"] <= bits
    wanted = {"kl_over_best_peer_b4_25", "kl_over_best_peer_b3_25", "kl_over_best_peer_worst", "kl_b6_over_b4"}
    wanted |= {"kl_b8_over_b4", "predicted_over_measured_b3_25"}
    wanted |= {"nested_penalty_b4", "nested_penalty_b3"}
    assert wanted <= set(measured.figures)
    assert all(math.isfinite(v) for v in measured.figures.values())


def test_ours_is_measured_as_the_kernels_compute_it():
    """The float32 weights of a map, against the planes read at it with exact inputs."""
    case = tiny_case()
    held_out = compare.HeldOut(case, case.model)
    ours = compare.Ours(case.model, ("embed", "idle"), case, held_out)
    plan = ours.within(2300)
    assert ours.bytes_of(plan) <= 2300
    compare.apply(ours.model, plan)
    assert ours.divergence(plan) == pytest.approx(held_out.divergence(ours.model), rel=1e-4)


def test_where_two_bits_are_too_many_tiles_are_dropped():
    case = tiny_case()
    ours = compare.Ours(case.model, ("embed", "idle"), case, compare.HeldOut(case, case.model))
    least = ours.bytes_of(ours.uniform(2))
    plan = ours.within(least - 200)
    assert ours.bytes_of(plan) <= least - 200
    assert any(plan.counts(site)[0] for site in plan.weight_sites())


def test_convolutions_have_a_stand_in():
    assert compare.stand_ins(Model()) == []
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    layers = gather(model, round_embeddings(model), [torch.randn(2, 3, 6, 6)], Logits())
    settings = compare.stand_ins(model)
    assert {o.point for o in settings} == set(POINTS)
    dense, size = compare.one_level_weights(layers, settings[0])
    assert dense["0"].shape == (8, 27)
    assert size == 8 * 27 // 2 + 4 * 8
    relative = (dense["0"] - layers.weights["0"]).square().sum() / layers.weights["0"].square().sum()
    assert 0 < float(relative) < 0.05
    assert max(len(row.unique()) for row in dense["0"]) <= 16


def row(model, point, ratio):
    return {"model": model, "point": point, "peer": "x", "ratio": ratio}


def test_figures_of_rows():
    rows = [row("a", "b4_25", 0.5), row("a", "b4_25", 0.8), row("b", "b4_25", 0.2), row("b", "b3_25", 1.1)]
    found = figures(rows)
    assert found["kl_over_best_peer_b4_25"] == pytest.approx(0.4)  # the root of 0.8 and 0.2
    assert found["kl_over_best_peer_b4_25_a"] == 0.8
    assert found["kl_over_best_peer_worst"] == 1.1
    assert "kl_over_best_peer_b2_5" not in found
    assert best_peers(rows)["a", "b4_25"]["ratio"] == 0.8
    assert figures([row("c", "b2_5", 0.7) | {"peer": STAND_IN}, row("c", "b2_5", 0.9)])[
        "kl_over_stand_in_b2_5"
    ] == pytest.approx(0.7)


def test_figures_of_maps():
    maps = {
        "uniform 3": 0.5,
        "uniform 4": 0.2,
        "uniform 6": 0.02,
        "uniform 8": 0.01,
        "one level 3": 0.4,
        "one level 4": 0.25,
    }
    rows = [{"model": "a", "map": name, "divergence": value} for name, value in maps.items()]
    rows.append({"model": "a", "map": "allocated b3_25", "divergence": 0.1, "predicted": 0.08})
    rows.append({"model": "b", "map": "allocated b3_25", "divergence": 0.1, "predicted": 0.11})
    found = figures(rows)
    assert found["nested_penalty_b4"] == pytest.approx(0.8)
    assert found["nested_penalty_b3"] == pytest.approx(1.25)
    assert found["kl_b6_over_b4"] == pytest.approx(0.1)
    assert found["kl_b8_over_b4"] == pytest.approx(0.05)
    assert found["prediction_error_b3_25_worst"] == pytest.approx(0.2)
    assert (found["predicted_kl_b3_25_a"], found["measured_kl_b3_25_a"]) == (0.08, 0.1)
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_every_offer_has_an_environment_and_a_script():
    for setting in SETTINGS:
        assert setting.environment in ENVIRONMENTS
        assert (SCRIPTS / setting.script).exists()
        assert setting.whole or setting.peer in round_matrices.FORMS
    assert {o.point for o in SETTINGS} == set(POINTS)


def test_bytes_of_codes_and_groups():
    assert round_matrices.packed(3, 100) == 38
    assert round_matrices.divisor(172, 64) == 43
    assert round_matrices.divisor(64, 128) == 64


def test_without_data_it_says_so(monkeypatch):
    monkeypatch.delenv("FOVEATE_DATA", raising=False)
    assert "FOVEATE_DATA is not set" in compare.measure().notes[0]
