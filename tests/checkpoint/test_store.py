"""The folder: what was saved is loaded again, and only the files that are needed are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import foveate as fv
from folders import LEVELS, X, at, copy_of, mixed, skeleton
from foveate.errors import BudgetError, CheckpointError, PlaneNotResidentError, SiteError
from foveate.files import LOCK
from tiny import llama, mlp, quantized_llama, resident_bytes, tokens


def test_everything_comes_back(saved: tuple[Path, nn.Module, fv.Profile]) -> None:
    folder, model, profile = saved
    loaded = fv.load(folder, model=skeleton())
    assert not loaded.training
    assert fv.current_map(loaded) == fv.current_map(model)
    for plan in (*(profile.uniform(level) for level in LEVELS), mixed(profile)):
        assert torch.equal(at(loaded, plan), at(model, plan))
    back = fv.profile_of(loaded)
    assert back.sites == profile.sites
    assert (back.samples, back.objective, back.notes, back.other_bytes) == (
        64,
        "logits",
        profile.notes,
        profile.other_bytes,
    )
    assert all(torch.equal(t, back.losses[n]) for n, t in profile.losses.items())
    assert all(torch.equal(t, back.statistics[n][k]) for n, kept in profile.statistics.items() for k, t in kept.items())
    assert fv.load_profile(folder).uniform(3) == profile.uniform(3)


@pytest.mark.parametrize("level", [2, 3, 4, 6, 8])
def test_keep_a_level(saved: tuple[Path, nn.Module, fv.Profile], level: int) -> None:
    folder, model, profile = saved
    loaded = fv.load(folder, keep=level, model=skeleton())
    plan = profile.uniform(level)
    assert fv.current_map(loaded) == plan
    assert torch.equal(loaded(X), at(model, plan))
    assert resident_bytes(loaded) == plan.bytes_resident


def test_keep_a_map_when_loading_and_when_saving(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    folder, model, profile = saved
    for seed in range(5):
        plan = mixed(profile, seed)
        loaded = fv.load(folder, keep=plan, model=skeleton())
        assert torch.equal(loaded(X), at(model, plan))
        fv.save(model, tmp_path / str(seed), keep=plan)
        head = fv.read_head(tmp_path / str(seed))
        assert head.plan == plan
        again = fv.load(tmp_path / str(seed), model=skeleton())
        assert torch.equal(again(X), at(model, plan))
        lower = plan.with_level("2:weight", 0)
        assert torch.equal(fv.load(tmp_path / str(seed), keep=lower, model=skeleton())(X), at(model, lower))


def _tensor_bytes(folder: Path, parts: Callable[[str], bool] = lambda part: part != "profile") -> int:
    total = 0
    for part, name in fv.read_head(folder).files.items():
        if parts(part):
            total += sum(t.numel() * t.element_size() for t in load_file(folder / name).values())
    return total


def test_bytes_stored_are_the_bytes_of_the_files(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    _, model, profile = saved
    # an input's level and range are nine bytes in memory, and no tensor in the file
    inputs = 9 * sum(s.kind == "input" for s in profile.sites)
    for i, plan in enumerate((profile.uniform(8), profile.uniform(3), mixed(profile))):
        fv.save(model, tmp_path / str(i), keep=plan)
        assert _tensor_bytes(tmp_path / str(i)) == plan.bytes_stored - inputs


def test_four_bits_need_only_the_first_files(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    folder, model, profile = saved
    part = copy_of(folder, tmp_path / "part")
    head = fv.read_head(folder)
    for name in ("plane3", "plane4", "profile"):
        (part / head.files[name]).unlink()
    assert torch.equal(fv.load(part, keep=4, model=skeleton())(X), at(model, profile.uniform(4)))
    assert torch.equal(fv.load(part, keep=2, model=skeleton())(X), at(model, profile.uniform(2)))
    with pytest.raises(CheckpointError, match=r"plane3-.* is missing"):
        fv.load(part, keep=6, model=skeleton())


def test_a_partial_model_saves_what_it_has(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    folder, model, profile = saved
    part = fv.load(folder, keep=4, model=skeleton())
    fv.save(part, tmp_path / "four")
    again = fv.load(tmp_path / "four", model=skeleton())
    assert torch.equal(again(X), at(model, profile.uniform(4)))
    assert fv.profile_of(again).samples == 64
    with pytest.raises(PlaneNotResidentError, match="the folder stores some of its tiles up to 4 bits only"):
        fv.load(tmp_path / "four", keep=8, model=skeleton())
    with pytest.raises(PlaneNotResidentError):
        fv.save(part, tmp_path / "more", keep=profile.uniform(6))
    assert not (tmp_path / "more").exists()
    # over itself
    fv.save(again, tmp_path / "four", keep=profile.uniform(2))
    assert torch.equal(fv.load(tmp_path / "four", model=skeleton())(X), at(model, profile.uniform(2)))


def test_the_best_map_that_fits(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    folder, model, profile = saved
    assert fv.current_map(fv.load(folder, memory="1GiB", model=skeleton())) == profile.uniform(8)
    budget = profile.uniform(4).bytes_resident
    loaded = fv.load(folder, memory=budget, model=skeleton())
    assert fv.memory_report(loaded).taken == fv.current_map(loaded).bytes_resident <= budget
    with pytest.raises(BudgetError, match="least"):
        fv.load(folder, memory=10, model=skeleton())
    with pytest.raises(CheckpointError, match="keep or memory, not both"):
        fv.load(folder, memory=budget, keep=4, model=skeleton())
    with pytest.raises(BudgetError, match="is not a number of bytes"):
        fv.load(folder, memory="much", model=skeleton())
    # of a folder that does not hold everything, the best that is there
    fv.save(model, tmp_path / "four", keep=profile.uniform(4))
    four = fv.load(tmp_path / "four", memory="1GiB", model=skeleton())
    assert {fv.current_map(four).levels[s.name] for s in profile.weight_sites()} == {4}


def test_the_default_map_can_be_changed(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    folder, model, profile = saved
    part = copy_of(folder, tmp_path / "part")
    before = {f.name: f.stat().st_mtime_ns for f in part.iterdir()}
    plan = mixed(profile)
    fv.save_map(part, plan)
    changed = [f.name for f in part.iterdir() if before.get(f.name) != f.stat().st_mtime_ns]
    assert changed == ["foveate.json"]
    loaded = fv.load(part, model=skeleton())
    assert fv.current_map(loaded) == plan
    fv.apply(loaded, profile.uniform(8))
    assert torch.equal(loaded(X), at(model, profile.uniform(8)))
    with pytest.raises(SiteError, match="of another model"):
        fv.save_map(part, quantized_llama()[1].uniform(4))
    fv.save(model, tmp_path / "four", keep=profile.uniform(4))
    with pytest.raises(PlaneNotResidentError):
        fv.save_map(tmp_path / "four", profile.uniform(6))
    assert fv.read_head(tmp_path / "four").plan == profile.uniform(4)


def test_saving_again_leaves_only_what_the_head_names(
    saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path
) -> None:
    _, model, profile = saved
    folder = tmp_path / "model"
    fv.save(model, folder)
    (folder / "notes.txt").write_text("mine")
    (folder / ".foveate-1234").mkdir()
    (folder / ".foveate-1234" / ".tmpabc").write_text("left behind by a kill")
    fv.save(model, folder, keep=profile.uniform(3))
    named = {LOCK, "foveate.json", "notes.txt", *fv.read_head(folder).files.values()}
    assert {f.name for f in folder.iterdir()} == named


class _Odd(nn.Module):
    """Shared parameters, buffers of other kinds, a convolution and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 40)
        self.conv = nn.Conv1d(40, 24, 3, padding=1)
        self.norm, self.other = nn.LayerNorm(24), nn.LayerNorm(24)
        self.other.weight = self.norm.weight
        self.head = nn.Linear(24, 6)
        self.register_buffer("mask", torch.ones(24, dtype=torch.bool))
        self.register_buffer("scale", torch.tensor(2.0, dtype=torch.float64), persistent=False)
        self.register_buffer("none", None)
        self.register_buffer("empty", torch.empty(0, 3))
        self.gate = nn.Parameter(torch.randn(5, 24).t(), requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embed(ids).transpose(-1, -2)).transpose(-1, -2)
        x = self.other(self.norm(x)) * self.mask * self.scale.float() + self.gate.sum(1)
        y: torch.Tensor = self.head(x)
        return y


def test_a_module_of_ones_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Odd().eval()
    ids = torch.randint(0, 20, (3, 7))
    fv.quantize(model, [ids], objective=fv.Logits(), progress=False)
    fv.save(model, tmp_path / "odd")
    with torch.device("meta"):
        skeleton = _Odd()
    for loaded in (fv.load(tmp_path / "odd", model=skeleton), fv.load(tmp_path / "odd", model=_Odd())):
        assert torch.equal(loaded(ids), model(ids))
        assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
            n: p.requires_grad for n, p in model.named_parameters()
        }
        assert loaded.scale.dtype == torch.float64  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match=r"is not of a transformers model: give the module to fill"):
        fv.load(tmp_path / "odd")


def test_a_skeleton_of_another_model(saved: tuple[Path, nn.Module, fv.Profile]) -> None:
    folder = saved[0]
    with pytest.raises(CheckpointError, match="does not hold a weight of 24 x 40"):
        fv.load(folder, model=mlp((70, 40, 25, 10)))
    with pytest.raises(CheckpointError, match="no module '4'"):
        fv.load(folder, model=mlp((70, 40, 24)))
    more = mlp()
    more.add_module("norm", nn.LayerNorm(10))
    with pytest.raises(CheckpointError, match="the checkpoint has nothing for norm"):
        fv.load(folder, model=more)
    without = mlp()
    without[2].bias = None
    with pytest.raises(CheckpointError, match=r"2\.bias of the model is missing"):
        fv.load(folder, model=without)


def test_a_transformers_model(tmp_path: Path) -> None:
    model, profile = quantized_llama(tie_word_embeddings=True)
    model.generation_config.max_new_tokens = 7
    model.generation_config.do_sample = False
    folder = tmp_path / "llama"
    fv.save(model, folder, keep=profile.uniform(4))
    batch = tokens(seed=6)[0]
    loaded: Any = fv.load(folder)
    fv.apply(model, profile.uniform(4))
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert type(loaded) is type(model)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.generation_config.max_new_tokens == 7
    ids = batch["input_ids"][:1]
    mask = torch.ones_like(ids)
    assert torch.equal(loaded.generate(ids, attention_mask=mask), model.generate(ids, attention_mask=mask))
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 32


def test_tokenizer_files_come_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    llama().save_pretrained(source)
    (source / "tokenizer.json").write_text("{}")
    (source / "unrelated.bin").write_text("")
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(source)
    fv.quantize(model, tokens(), progress=False)
    fv.save(model, tmp_path / "one")
    fv.save(fv.load(tmp_path / "one"), tmp_path / "two")
    for folder in ("one", "two"):
        assert (tmp_path / folder / "tokenizer.json").read_text() == "{}"
        assert not (tmp_path / folder / "unrelated.bin").exists()
        assert not list((tmp_path / folder).glob("model*.safetensors"))


def test_static_scales_are_kept(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    model = fv.load(saved[0], model=skeleton())
    fv.apply(model, fv.profile_of(model).uniform(4))
    fv.use_static_scales(model)
    wanted = model(X)
    fv.save(model, tmp_path / "static")
    loaded = fv.load(tmp_path / "static", model=skeleton())
    assert torch.equal(loaded(X), wanted)
    fv.use_static_scales(loaded, False)
    assert not torch.equal(loaded(X), wanted)
    fv.save(loaded, tmp_path / "static")
    assert not torch.equal(fv.load(tmp_path / "static", model=skeleton())(X), wanted)


def test_what_stays_float_comes_back(tmp_path: Path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)

    model = net()
    profile = fv.quantize(model, [torch.randn(8, 20, 64)], objective=fv.Logits(), progress=False)
    attention = 3 * 64 * 64 + 3 * 64
    assert profile.other_parameters is not None
    assert profile.other_parameters["MultiheadAttention"] == attention
    assert sum(profile.other_parameters.values()) == sum(p.numel() for p in model.parameters())
    assert any(note.startswith("51 % of the parameters stay float: MultiheadAttention 37 %") for note in profile.notes)
    fv.save(model, tmp_path / "out", keep=profile.uniform(4))
    loaded = fv.load(tmp_path / "out", model=net())
    for plan in (
        fv.read_head(tmp_path / "out").plan,
        fv.current_map(loaded),
        fv.load_profile(tmp_path / "out").uniform(3),
    ):
        assert plan.other_parameters == profile.other_parameters
        assert "51 % of the parameters stay float" in repr(plan)
