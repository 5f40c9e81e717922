"""Modules with a forward of their own around a product: on planes, with the rest of what they do."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import foveate as fv
from foveate.nn.modules import PlaneEmbedding
from tiny import TRANSFORMER, tokens


class Scaled(nn.Embedding):
    """As Gemma's: the rows, scaled by a buffer."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(rows, columns)
        self.register_buffer("scale", torch.tensor(3.0), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale.to(self.weight.dtype)


class Shifted(nn.Embedding):
    """As OPT's: other rows than those asked for."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flip(-1))


class Gated(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).sigmoid() + self.bias


class Padded(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(input, (2, 0)))


class Standardized(nn.Linear):
    """Reads its weight itself."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight - self.weight.mean(), self.bias)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = Scaled(50, 32), Shifted(20, 32)
        self.conv, self.gate, self.standard = Padded(32, 32, 3), Gated(32, 32), Standardized(32, 32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        x = self.conv(x.mT).mT
        y: Tensor = self.head(self.standard(self.gate(x)))
        return y


def _batches() -> list[Tensor]:
    return [batch["input_ids"] for batch in tokens(8, 12)]


def _quantized() -> tuple[Net, Net, fv.Profile]:
    model = Net().eval()
    original = copy.deepcopy(model)
    return model, original, fv.quantize(model, _batches(), objective=fv.Logits(), progress=False)


def test_their_products_are_on_planes_and_the_rest_runs_as_before(tmp_path: Path) -> None:
    model, original, profile = _quantized()
    x = _batches()[0]
    sites = {s.name: s.aliases for s in profile.weight_sites()}
    assert sites == {"words:weight": ("head:weight",), "places:weight": (), "conv:weight": (), "gate:weight": ()}
    assert {s.name for s in profile.input_sites()} == {"head:input", "conv:input", "gate:input"}
    assert type(model.standard) is Standardized
    assert isinstance(model.words, Scaled)
    assert isinstance(model.words.product, PlaneEmbedding)
    assert model.words.weight is model.head.weight
    fv.apply(model, profile.uniform(8, 16))
    with torch.no_grad():
        y, expected = model(x), original(x)
        assert float((y - expected).norm() / expected.norm()) < 0.02
        fv.save(model, tmp_path / "out")
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fv.load(tmp_path / "out", model=Net())]
        for made in copies:
            assert torch.equal(made(x), y)
        fv.apply(copies[0], profile.uniform(2))
        assert torch.equal(model(x), y)
        fv.apply(model, profile.uniform(2))
        assert torch.equal(copies[0](x), model(x))


def test_statistics_are_of_the_product_not_of_what_is_around_it() -> None:
    _, original, profile = _quantized()
    with torch.no_grad():
        found = torch.stack([original.words.weight[x].aminmax()[i] for x in _batches() for i in (0, 1)])
    kept = profile.statistics["words:weight"]["output_range"]
    assert kept[0] <= found.min() + 1e-5
    read = profile.statistics["places:weight"]["row_frequency"]
    assert float(read.sum()) == pytest.approx(1)
    for site in profile.weight_sites():
        assert float(profile.losses[site.name][:, 1].sum()) > 0


def test_what_holds_no_planes_is_put_back_together() -> None:
    model = Net()
    before = dict(model.named_parameters())
    fv.quantize(model, _batches(), objective=fv.Logits(), skip=("gate", "places"), progress=False)
    for name, kind in (("gate", Gated), ("places", Shifted), ("standard", Standardized)):
        module = model.get_submodule(name)
        assert type(module) is kind
        assert module.weight is before[f"{name}.weight"]
        assert [n for n, _ in module.named_parameters()] == [n.split(".")[1] for n in before if n.startswith(name)]


def test_a_forward_that_never_ran_may_do_anything() -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle, self.again = nn.Linear(32, 32), Gated(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.again(self.used(x))
            return y

    model = Held()
    profile = fv.quantize(model, [torch.randn(64, 32)], objective=fv.Logits(), progress=False)
    assert [s.name for s in profile.weight_sites()] == ["used:weight", "again:weight"]
    assert "the weights of idle stay float: their modules have forwards of their own that never ran" in profile.notes


@pytest.mark.parametrize("memory", [None, "2GiB"])
def test_gemma(memory: str | None, tmp_path: Path) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**TRANSFORMER, head_dim=8)).eval()
    profile = fv.quantize(model, tokens(), progress=False, memory=memory)
    assert profile.weight_sites()[0].name == "model.embed_tokens:weight"
    assert profile.weight_sites()[0].aliases == ("lm_head:weight",)
    fv.save(model, tmp_path / "out")
    ids = tokens()[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(fv.load(tmp_path / "out")(ids).logits, model(ids).logits)
