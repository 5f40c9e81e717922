"""The folder: what is saved is what is loaded, from fewer files where fewer will do, and never half of anything."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import llama, mlp, quantized_llama, quantized_mlp, rows, tokens
from torch import nn

import foveate as fv
from foveate import checkpoint
from foveate.errors import BudgetError, CheckpointError, FoveateError, LevelError, PlaneNotResidentError, SiteError

X = rows(seed=5)[0]
LEVELS = (0, 2, 3, 4, 6, 8)


def _skeleton() -> nn.Module:
    with torch.device("meta"):
        return mlp()


def _mixed(profile: fv.Profile, seed: int = 0, top: int = 8) -> fv.PrecisionMap:
    plan = profile.uniform(top)
    levels = dict(plan.levels)
    for i, site in enumerate(profile.weight_sites()):
        choice = random.Random(seed + i)
        levels[site.name] = bytes(choice.choice([level for level in LEVELS if level <= top]) for _ in range(site.tiles))
    return fv.PrecisionMap(plan.sites, levels, plan.other_bytes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, fv.Profile]:
    model, profile = quantized_mlp()
    folder = tmp_path_factory.mktemp("saved") / "model"
    fv.save(model, folder)
    return folder, model, profile


def _copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def _at(model: nn.Module, plan: fv.PrecisionMap) -> torch.Tensor:
    before = fv.current_map(model)
    fv.apply(model, plan)
    with torch.no_grad():
        y: torch.Tensor = model(X)
    fv.apply(model, before)
    return y


# ------------------------------------------------------------------------------------------------------------ round trips


def test_everything_comes_back(saved: tuple[Path, nn.Module, fv.Profile]) -> None:
    folder, model, profile = saved
    loaded = fv.load(folder, model=_skeleton())
    assert not loaded.training
    assert fv.current_map(loaded) == fv.current_map(model)
    for plan in (*(profile.uniform(level) for level in LEVELS), _mixed(profile)):
        assert torch.equal(_at(loaded, plan), _at(model, plan))
    back = fv.profile_of(loaded)
    assert back.sites == profile.sites
    assert (back.samples, back.objective, back.notes, back.other_bytes) == (64, "logits", (), profile.other_bytes)
    assert all(torch.equal(t, back.losses[n]) for n, t in profile.losses.items())
    assert all(torch.equal(t, back.statistics[n][k]) for n, kept in profile.statistics.items() for k, t in kept.items())
    assert fv.load_profile(folder).uniform(3) == profile.uniform(3)


@pytest.mark.parametrize("level", [2, 3, 4, 6, 8])
def test_keep_a_level(saved: tuple[Path, nn.Module, fv.Profile], level: int) -> None:
    folder, model, profile = saved
    loaded = fv.load(folder, keep=level, model=_skeleton())
    plan = profile.uniform(level)
    assert fv.current_map(loaded) == plan
    assert torch.equal(loaded(X), _at(model, plan))
    assert sum(t.numel() * t.element_size() for t in (*loaded.parameters(), *loaded.buffers())) == plan.bytes_resident


def test_keep_a_map_when_loading_and_when_saving(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    folder, model, profile = saved
    for seed in range(5):
        plan = _mixed(profile, seed)
        loaded = fv.load(folder, keep=plan, model=_skeleton())
        assert torch.equal(loaded(X), _at(model, plan))
        fv.save(model, tmp_path / str(seed), keep=plan)
        head = fv.read_head(tmp_path / str(seed))
        assert head.plan == plan
        again = fv.load(tmp_path / str(seed), model=_skeleton())
        assert torch.equal(again(X), _at(model, plan))
        lower = plan.with_level("2:weight", 0)
        assert torch.equal(fv.load(tmp_path / str(seed), keep=lower, model=_skeleton())(X), _at(model, lower))


def _tensor_bytes(folder: Path, parts: Callable[[str], bool] = lambda part: part != "profile") -> int:
    total = 0
    for part, name in fv.read_head(folder).files.items():
        if parts(part):
            total += sum(t.numel() * t.element_size() for t in load_file(folder / name).values())
    return total


def test_bytes_stored_are_the_bytes_of_the_files(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    _, model, profile = saved
    # the levels of inputs are two bytes in memory each, and part of the map in the file
    inputs = 2 * sum(s.kind == "input" for s in profile.sites)
    for i, plan in enumerate((profile.uniform(8), profile.uniform(3), _mixed(profile))):
        fv.save(model, tmp_path / str(i), keep=plan)
        assert _tensor_bytes(tmp_path / str(i)) == plan.bytes_stored - inputs


def test_four_bits_need_only_the_first_files(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    folder, model, profile = saved
    part = _copy(folder, tmp_path / "part")
    head = fv.read_head(folder)
    for name in ("plane3", "plane4", "profile"):
        (part / head.files[name]).unlink()
    assert torch.equal(fv.load(part, keep=4, model=_skeleton())(X), _at(model, profile.uniform(4)))
    assert torch.equal(fv.load(part, keep=2, model=_skeleton())(X), _at(model, profile.uniform(2)))
    with pytest.raises(CheckpointError, match=r"plane3-.* is missing"):
        fv.load(part, keep=6, model=_skeleton())


def test_a_partial_model_saves_what_it_has(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    folder, model, profile = saved
    part = fv.load(folder, keep=4, model=_skeleton())
    fv.save(part, tmp_path / "four")
    again = fv.load(tmp_path / "four", model=_skeleton())
    assert torch.equal(again(X), _at(model, profile.uniform(4)))
    assert fv.profile_of(again).samples == 64
    with pytest.raises(PlaneNotResidentError, match="the folder keeps some of its tiles up to 4 bits only"):
        fv.load(tmp_path / "four", keep=8, model=_skeleton())
    with pytest.raises(PlaneNotResidentError):
        fv.save(part, tmp_path / "more", keep=profile.uniform(6))
    assert not (tmp_path / "more").exists()
    # over itself
    fv.save(again, tmp_path / "four", keep=profile.uniform(2))
    assert torch.equal(fv.load(tmp_path / "four", model=_skeleton())(X), _at(model, profile.uniform(2)))


def test_the_best_map_that_fits(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    folder, model, profile = saved
    assert fv.current_map(fv.load(folder, memory="1GiB", model=_skeleton())) == profile.uniform(8)
    budget = profile.uniform(4).bytes_resident
    loaded = fv.load(folder, memory=budget, model=_skeleton())
    resident = sum(t.numel() * t.element_size() for t in (*loaded.parameters(), *loaded.buffers()))
    assert resident == fv.current_map(loaded).bytes_resident <= budget
    with pytest.raises(BudgetError, match="least"):
        fv.load(folder, memory=10, model=_skeleton())
    with pytest.raises(CheckpointError, match="keep or memory, not both"):
        fv.load(folder, memory=budget, keep=4, model=_skeleton())
    with pytest.raises(BudgetError, match="is not a number of bytes"):
        fv.load(folder, memory="much", model=_skeleton())
    # of a folder that does not hold everything, the best that is there
    fv.save(model, tmp_path / "four", keep=profile.uniform(4))
    four = fv.load(tmp_path / "four", memory="1GiB", model=_skeleton())
    assert {fv.current_map(four).levels[s.name] for s in profile.weight_sites()} == {4}


def test_the_default_map_can_be_changed(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    folder, model, profile = saved
    part = _copy(folder, tmp_path / "part")
    before = {f.name: f.stat().st_mtime_ns for f in part.iterdir()}
    plan = _mixed(profile)
    fv.save_map(part, plan)
    changed = [f.name for f in part.iterdir() if before.get(f.name) != f.stat().st_mtime_ns]
    assert changed == ["foveate.json"]
    loaded = fv.load(part, model=_skeleton())
    assert fv.current_map(loaded) == plan
    fv.apply(loaded, profile.uniform(8))
    assert torch.equal(loaded(X), _at(model, profile.uniform(8)))
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
    (folder / ".foveate-plane0-000000000000.safetensors.1234").write_text("left behind by a kill")
    fv.save(model, folder, keep=profile.uniform(3))
    named = {"foveate.json", "notes.txt", *fv.read_head(folder).files.values()}
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
    with pytest.raises(CheckpointError, match="2.bias of the model is missing"):
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


# ---------------------------------------------------------------------------------------------------------------- damage


def test_what_is_no_checkpoint(tmp_path: Path, saved: tuple[Path, nn.Module, fv.Profile]) -> None:
    for reader in (fv.read_head, fv.load, fv.load_profile, lambda p: fv.save_map(p, saved[2].uniform(4))):
        with pytest.raises(CheckpointError, match="is not a folder"):
            reader(tmp_path / "nothing")
        with pytest.raises(CheckpointError, match=r"holds no foveate.json: it is not a foveate checkpoint"):
            reader(tmp_path)


def _parts(folder: Path) -> list[str]:
    return ["foveate.json", *fv.read_head(folder).files.values()]


@pytest.mark.parametrize("how", ["cut in half", "empty", "cut by a byte", "missing", "a folder"])
def test_truncated_and_missing_files(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path, how: str) -> None:
    folder = saved[0]
    for i, name in enumerate(_parts(folder)):
        part = _copy(folder, tmp_path / str(i))
        file = part / name
        content = file.read_bytes()
        if how == "missing":
            file.unlink()
        elif how == "a folder":
            file.unlink()
            file.mkdir()
        else:
            file.write_bytes(
                content[: {"cut in half": len(content) // 2, "empty": 0, "cut by a byte": len(content) - 1}[how]]
            )
        with pytest.raises(CheckpointError, match=r"foveate[a-z0-9.-]*"):
            if "profile" in name:
                fv.load_profile(part)
            fv.load(part, model=_skeleton())


def test_a_bit_flipped_anywhere(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    folder, model, _ = saved
    part = _copy(folder, tmp_path / "part")
    choice = random.Random(0)
    expected = model(X)
    harmless = 0
    for name in _parts(folder):
        content = (part / name).read_bytes()
        for _ in range(25):
            at = choice.randrange(len(content))
            flipped = bytearray(content)
            flipped[at] ^= 1 << choice.randrange(8)
            (part / name).write_bytes(flipped)
            try:
                if "profile" in name:
                    fv.load_profile(part)
                y = fv.load(part, model=_skeleton())(X)
            except CheckpointError:
                continue
            # only padding of a safetensors head, or white space of ours, can change without harm
            assert torch.equal(y, expected)
            harmless += 1
        (part / name).write_bytes(content)
    assert harmless < 25


def _rewrite(folder: Path, change: Callable[[Any], Any], *, signed: bool = True) -> None:
    file = folder / "foveate.json"
    data = json.loads(file.read_bytes())
    data = change(data)
    if signed and isinstance(data, dict):
        data["sha256"] = checkpoint._head_checksum(data)
    file.write_text(json.dumps(data))


def _with(**changes: Any) -> Callable[[Any], Any]:
    return lambda data: {**data, **changes}


def test_versions_and_features(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    cases = {
        "of format version 2, newer than this foveate reads (1): upgrade foveate": _with(version=2),
        "needs features that this foveate does not have: exact_tiles, zero_mask: upgrade foveate": _with(
            features=["zero_mask", "exact_tiles"]
        ),
        "does not name the format": _with(format="other"),
        "is malformed": _with(version="1"),
    }
    for i, (message, change) in enumerate(cases.items()):
        part = _copy(saved[0], tmp_path / str(i))
        _rewrite(part, change)
        with pytest.raises(CheckpointError) as caught:
            fv.read_head(part)
        assert message in str(caught.value)
    # a newer version says so first, whatever its head looks like
    _rewrite(part, lambda data: {"version": 9, "features": []} | {"format": "foveate"}, signed=False)
    with pytest.raises(CheckpointError, match="of format version 9"):
        fv.read_head(part)


def test_an_altered_head_is_noticed(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    part = _copy(saved[0], tmp_path / "part")
    _rewrite(part, _with(other_bytes=5), signed=False)
    with pytest.raises(CheckpointError, match="its checksum does not match"):
        fv.read_head(part)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "foveate-plane0-000000000000.safetensors/..",
        "",
        5,
        None,
        "foveate-plane0-000000000000.safetensors\n",
    ],
)
def test_file_names_cannot_point_elsewhere(
    saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path, name: Any
) -> None:
    part = _copy(saved[0], tmp_path / "part")

    def change(data: Any) -> Any:
        data["files"]["plane0"]["file"] = name
        return data

    _rewrite(part, change)
    with pytest.raises(CheckpointError, match="is malformed"):
        fv.load(part, model=_skeleton())


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5), st.just([]), st.just({}),
    st.just([1]), st.just({"a": 1}), st.just([[8, 10**12]]), st.just([["a"]]), st.sampled_from((0, 1, 2, 5, 32, 33, 10**9)),
)  # fmt: skip


def _mutate(data: Any, draw: Callable[[Any], Any]) -> None:
    """Change, drop or add one entry somewhere."""
    while True:
        keys = list(data) if isinstance(data, dict) else list(range(len(data)))
        if not keys:
            return
        key = draw(st.sampled_from(keys))
        if isinstance(data[key], (dict, list)) and data[key] and draw(st.integers(0, 3)):
            data = data[key]
            continue
        what = draw(st.sampled_from(("change", "change", "drop", "add")))
        if what == "drop":
            del data[key]
        elif what == "add" and isinstance(data, dict):
            data[draw(st.text(max_size=5))] = copy.deepcopy(draw(ODD))
        else:
            data[key] = copy.deepcopy(draw(ODD))
        return


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_malformed_head_is_a_checkpoint_error(
    saved: tuple[Path, nn.Module, fv.Profile], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder, model, _ = saved
    part = folder.parent / "mutated"
    if not part.exists():
        _copy(folder, part)
    original = json.loads((folder / "foveate.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 2))):
        _mutate(original, data.draw)
    original.pop("sha256", None)
    (part / "foveate.json").write_text(json.dumps({**original, "sha256": checkpoint._head_checksum(original)}))
    try:
        loaded = fv.load(part, model=_skeleton())
        fv.load_profile(part)
    except CheckpointError:
        return
    except PlaneNotResidentError:
        return  # a map above what is stored
    # what was changed does not matter to the weights: the map, a count, a note
    top = fv.profile_of(model).uniform(8)
    if fv.current_map(loaded).levels == top.levels:
        assert torch.equal(loaded(X), model(X))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"3",
        b'"x"',
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"version": 1}',
        b'{"version": 1, "features": 5}',
        b'{"version": 1, "features": [[]]}',
        b'{"version": 1, "features": [1]}',
    ],
)
def test_a_head_that_is_no_head(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path, text: bytes) -> None:
    part = _copy(saved[0], tmp_path / "part")
    (part / "foveate.json").write_bytes(text)
    with pytest.raises(CheckpointError):
        fv.load(part, model=_skeleton())


def test_data_files_that_do_not_fit_their_head(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    """Well-formed files with right checksums, but of another shape, dtype or value."""
    folder = saved[0]
    changes: dict[str, tuple[str, str, Callable[[torch.Tensor], torch.Tensor]]] = {
        "a plane cut off": ("plane0", "0:weight", lambda t: t[:-512]),
        "a plane of another dtype": ("plane0", "0:weight", lambda t: t.view(torch.int8)),
        "no scales": ("scales", "0:weight|scales", lambda t: t[:0]),
        "scales of another dtype": ("scales", "0:weight|scales", lambda t: t.view(torch.int16)),
        "levels that do not exist": ("scales", "0:weight|resident", lambda t: t - 1),
        "levels of another grid": ("scales", "0:weight|resident", lambda t: t[:1]),
        "levels of another dtype": ("scales", "0:weight|resident", lambda t: t.int()),
        "gains of another shape": ("scales", "0:weight|gain", lambda t: t[:4]),
        "a profile of other tiles": ("profile", "0:weight|losses", lambda t: t[1:]),
        "a bias of another shape": ("rest", "0.bias", lambda t: t[1:]),
    }
    for i, (what, (part, key, change)) in enumerate(changes.items()):
        made = _copy(folder, tmp_path / str(i))
        head = json.loads((made / "foveate.json").read_bytes())
        file = made / head["files"][part]["file"]
        tensors = {k: t.clone() for k, t in load_file(file).items()}
        tensors[key] = change(tensors[key]).contiguous()
        save_file(tensors, file)
        head["files"][part]["sha256"][key] = checkpoint._checksum(tensors[key])
        _rewrite(made, lambda data, head=head: head)
        with pytest.raises(CheckpointError):
            fv.load(made, model=_skeleton())
            fv.load_profile(made)
            pytest.fail(what)


def test_levels_and_maps_that_do_not_fit(saved: tuple[Path, nn.Module, fv.Profile]) -> None:
    folder = saved[0]
    with pytest.raises(LevelError, match=r"level \(=5\)"):
        fv.load(folder, keep=5, model=_skeleton())
    with pytest.raises(SiteError, match="of another model"):
        fv.load(folder, keep=quantized_llama()[1].uniform(4), model=_skeleton())
    with pytest.raises(SiteError, match="of another model"):
        fv.save(saved[1], folder.parent / "never", keep=quantized_llama()[1].uniform(4))
    assert not (folder.parent / "never").exists()
    with pytest.raises(FoveateError, match="not quantized"):
        fv.save(mlp(), folder.parent / "never")


@pytest.mark.parametrize(
    "change",
    [
        {"transformers": "AutoModel"},
        {"transformers": "os"},
        {"transformers": 5},
        {"config": 5},
        {"config": {"hidden_size": "x"}},
        {"config": {"num_attention_heads": 0}},
    ],
)
def test_a_model_that_cannot_be_rebuilt(tmp_path: Path, change: dict[str, Any]) -> None:
    model, _ = quantized_llama()
    fv.save(model, tmp_path / "llama")

    def changed(data: Any) -> Any:
        for key, value in change.items():
            data["model"][key] = {**data["model"][key], **value} if isinstance(value, dict) else value
        return data

    _rewrite(tmp_path / "llama", changed)
    with pytest.raises(CheckpointError):
        fv.load(tmp_path / "llama")


# --------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("after", range(11))
def test_a_write_that_fails_leaves_what_was_there(
    saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    folder, model, profile = saved
    old = _copy(folder, tmp_path / "old")
    fv.save_map(old, profile.uniform(3))
    before = {f.name: f.read_bytes() for f in old.iterdir()}
    calls = 0
    commit = checkpoint._commit

    def full(temporary: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(28, "No space left on device")
        commit(temporary, target)

    monkeypatch.setattr(checkpoint, "_commit", full)
    plan = profile.uniform(4)
    if after >= 9:  # eight files and the head
        fv.save(model, old, keep=plan)
        return
    with pytest.raises(CheckpointError, match="No space left on device"):
        fv.save(model, old, keep=plan)
    assert {f.name: f.read_bytes() for f in old.iterdir()} == before
    with pytest.raises(CheckpointError, match="No space left on device"):
        fv.save(model, tmp_path / "new", keep=plan)
    assert not (tmp_path / "new").exists()


_FULL_DISK = """
    import resource, sys
    import torch
    sys.path.insert(0, sys.argv[1])
    from tiny import quantized_mlp
    import foveate as fv
    model, _ = quantized_mlp()
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
    try:
        fv.save(model, sys.argv[2])
    except fv.CheckpointError as error:
        print(error)
        sys.exit(2)
"""


@pytest.mark.parametrize("limit", [100, 2000])
def test_a_disk_that_is_full(tmp_path: Path, limit: int) -> None:
    done = _python(_FULL_DISK, tmp_path / "out", limit)
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stdout
    assert not (tmp_path / "out").exists()


def _python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), str(Path(__file__).parent), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_folder_that_cannot_be_written(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    _, model, _ = saved
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot write"):
        fv.save(model, tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot write"):
        fv.save(model, tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"
    folder = tmp_path / "read-only"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(CheckpointError, match="cannot write"):
        fv.save(model, folder)


_SAVE_FOR_EVER = """
    import sys
    sys.path.insert(0, sys.argv[1])
    from tiny import mlp
    import foveate as fv
    model = fv.load(sys.argv[3], model=mlp())
    profile = fv.profile_of(model)
    print("ready", flush=True)
    while True:
        for level in (4, 8):
            fv.save(model, sys.argv[2], keep=profile.uniform(level))
"""


def test_kill_9_while_saving_over_a_checkpoint(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    source, model, profile = saved
    folder = tmp_path / "model"
    fv.save(model, folder, keep=profile.uniform(4))
    expected = {level: _at(model, profile.uniform(level)) for level in (4, 8)}
    choice = random.Random(0)
    for _ in range(3):
        command = [sys.executable, "-c", textwrap.dedent(_SAVE_FOR_EVER), str(Path(__file__).parent), folder, source]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(choice.uniform(0.0, 0.2))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        loaded = fv.load(folder, model=_skeleton())
        level = fv.current_map(loaded).levels["0:weight"]
        with torch.no_grad():
            assert torch.equal(loaded(X), expected[level])  # type: ignore[index]
    # and the next save clears up
    fv.save(model, folder)
    assert {f.name for f in folder.iterdir()} == {"foveate.json", *fv.read_head(folder).files.values()}


def test_a_kill_between_any_two_files(
    saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that stops dead cleans up nothing: as if `_commit` never returned."""

    class Dead(BaseException):
        pass

    old, old_profile = quantized_llama()
    new, _ = quantized_llama(hidden_size=64, num_hidden_layers=1)
    commit = checkpoint._commit
    expected = old(**tokens()[0]).logits
    for after in range(20):
        folder = tmp_path / str(after)
        fv.save(old, folder)
        calls = 0

        def stop(temporary: Path, target: Path) -> None:
            nonlocal calls
            calls += 1
            if calls > after:  # noqa: B023
                raise Dead
            commit(temporary, target)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_commit", stop)
            try:
                fv.save(new, folder)
            except Dead:
                assert torch.equal(fv.load(folder)(**tokens()[0]).logits, expected)
                continue
        assert fv.load(folder).config.hidden_size == 64  # type: ignore[union-attr]
        return
    pytest.fail("saving never ended")


def test_the_files_are_plain_safetensors(saved: tuple[Path, nn.Module, fv.Profile]) -> None:
    folder, model, _ = saved
    head = fv.read_head(folder)
    with safe_open(folder / head.files["plane0"], "pt") as tensors:
        assert sorted(tensors.keys()) == ["0:weight", "2:weight", "4:weight"]
        assert torch.equal(tensors.get_tensor("0:weight"), model[0].weight.plane0)  # type: ignore[index]
    data = json.loads((folder / "foveate.json").read_bytes())
    assert (data["format"], data["version"], data["features"]) == ("foveate", 1, [])
    assert head.written_by.startswith("foveate ")
    assert head.dtype == {"0:weight": "float32", "2:weight": "float32", "4:weight": "float32"}
