"""Models as people have them: wrapped, pickled, with modules and weights that are shared or read from elsewhere."""

from __future__ import annotations

import copy
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import foveate as fv
from foveate.memory.arena import HUGE_PAGE, arena
from tiny import tokens

X = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))


def _net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_has_levels_of_its_own(copied: object) -> None:
    model = _net()
    profile = fv.quantize(model, [X], objective=fv.Logits(), progress=False)
    before = model(X)
    other = copied(model)  # type: ignore[operator]
    assert torch.equal(other(X), before)
    fv.apply(other, profile.uniform(2))
    assert not torch.equal(other(X), before)
    assert torch.equal(model(X), before)


def test_what_is_inside_a_wrapper_is_saved(tmp_path: Path) -> None:
    model = _net()
    fv.quantize(model, [X], progress=False)
    fv.save(nn.DataParallel(model), tmp_path / "out")
    assert torch.equal(fv.load(tmp_path / "out", model=_net())(X), model(X))


def test_a_module_with_two_names_stays_one(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(64, 64)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model = Twice()
    profile = fv.quantize(model, [X], progress=False)
    assert model.a is model.b
    assert [s.name for s in profile.sites] == ["a:weight", "a:input"]
    fv.save(model, tmp_path / "out")
    again = fv.load(tmp_path / "out", model=Twice())
    assert again.a is again.b
    assert torch.equal(again(X), model(X))


def test_embeddings_alone() -> None:
    model = nn.Sequential(nn.Embedding(50, 32))
    profile = fv.quantize(model, [torch.randint(0, 50, (4, 7))], progress=False)
    fv.apply(model, profile.uniform(3))
    assert model(torch.tensor([3])).shape == (1, 32)


def test_a_weight_that_another_module_uses_stays() -> None:
    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(50, 64))

        def forward(self, input: Tensor) -> Tensor:
            return self.weight[input]

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = Looked()
            self.inner = nn.Linear(64, 64)
            self.head = nn.Linear(64, 50, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(self.embed(x)))

    model = Tied()
    profile = fv.quantize(model, [torch.randint(0, 50, (4, 7))], progress=False)
    assert [s.name for s in profile.weight_sites()] == ["inner:weight"]
    assert model.head.weight is model.embed.weight


def test_torchs_encoder_layer_runs() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.ModuleDict({"encoder": layer, "head": nn.Linear(64, 64)})
    whole = nn.Sequential(model["encoder"], model["head"]).eval()
    x = torch.randn(2, 5, 64)
    fv.quantize(whole, [x], progress=False)
    with torch.no_grad():
        assert whole(x).shape == x.shape


def test_a_weight_read_past_its_module_stays_and_planes_are_refused_with_advice() -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 64)
            self.inner = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.inner(self.embed(x)), self.embed.weight)

    model = Direct()
    profile = fv.quantize(model, [torch.randint(0, 50, (4, 7))], progress=False)
    assert [s.name for s in profile.weight_sites()] == ["inner:weight"]
    assert any("embed" in note and "linear in Direct" in note for note in profile.notes)
    assert model(torch.tensor([1])).shape == (1, 50)
    with pytest.raises(fv.FoveateError, match=r"linear was given inner:weight, which is on planes.*skip="):
        F.linear(torch.randn(1, 64), model.inner.weight)


def test_hooks_and_keywords_go_on_working() -> None:
    model = _net()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    fv.quantize(model, [X], progress=False)
    calls.clear()
    model(X)
    assert calls == [1]
    assert model[0](input=X).shape == (8, 64)


def test_verify_measures_what_the_profile_was_made_for() -> None:
    model, original = _net(), _net()
    profile = fv.quantize(model, [X], objective=fv.Logits(), progress=False)
    found = fv.verify(model, profile.uniform(4), [X], reference=original, progress=False)
    got, wanted = _at(model, profile.uniform(4)).log_softmax(1), original(X).log_softmax(1).detach()
    expected = (wanted.exp() * (wanted - got)).sum(1).mean()
    assert found.measured.divergence == pytest.approx(float(expected), rel=1e-3)
    assert "KL" in str(found)


def _at(model: nn.Module, plan: fv.PrecisionMap) -> Tensor:
    fv.apply(model, plan)
    with torch.no_grad():
        out: Tensor = model(X)
    return out


def test_labels_in_a_batch_get_advice() -> None:
    with pytest.raises(fv.DataError, match="hand on its inputs only"):
        fv.quantize(_net(), [(X, torch.zeros(8))], progress=False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_big_blocks_are_private_and_ask_for_huge_pages() -> None:
    block = arena([4 * HUGE_PAGE])[0]
    block.fill_(1)
    start = block.data_ptr()
    mapping = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line)
        if found:
            inside = int(found[1], 16) <= start < int(found[2], 16)
            mapping = found[3] if inside else mapping
        elif line.startswith("VmFlags") and inside:
            assert mapping is not None
            assert mapping.endswith("p")
            assert "hg" in line.split()
            return
    pytest.fail("the block is in no mapping")


def test_t5_whose_embedding_is_reached_through_other_modules() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(vocab_size=50, **sizes, decoder_start_token_id=0)).eval()
    original = copy.deepcopy(model)

    def batches(seed: int) -> list[dict[str, Tensor]]:
        ids, answers = tokens(4, 20, seed=seed), tokens(4, 16, seed=seed + 1)
        return [{**batch, "decoder_input_ids": other["input_ids"]} for batch, other in zip(ids, answers, strict=True)]

    profile = fv.quantize(model, batches(1), progress=False)
    assert not any("never reached" in note for note in profile.notes)
    # codes were fitted to 64 rows of 32 columns, and the embedding's look-ups were not fitted to at all
    found = fv.verify(model, profile.uniform(4), batches(3), reference=original, progress=False)
    assert found.predicted == pytest.approx(found.measured.divergence, rel=0.5)
