"""Reading a damaged folder gives the model that was saved, or a `CheckpointError`."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save_file
from torch import nn

import foveate as fv
from folders import X, copy_of, parts, read_all, rewrite, skeleton, with_
from foveate.checkpoint.head import head_checksum
from foveate.errors import CheckpointError, FoveateError, LevelError, SiteError
from foveate.files import checksum
from tiny import mlp, quantized_llama


def test_what_is_no_checkpoint(tmp_path: Path, saved: tuple[Path, nn.Module, fv.Profile]) -> None:
    for reader in (fv.read_head, fv.load, fv.load_profile, lambda p: fv.save_map(p, saved[2].uniform(4))):
        with pytest.raises(CheckpointError, match="is not a folder"):
            reader(tmp_path / "nothing")
        with pytest.raises(CheckpointError, match=r"holds no foveate.json: it is not a foveate checkpoint"):
            reader(tmp_path)


@pytest.mark.parametrize("how", ["cut in half", "empty", "cut by a byte", "missing", "a folder"])
def test_truncated_and_missing_files(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path, how: str) -> None:
    folder = saved[0]
    for i, name in enumerate(parts(folder)):
        part = copy_of(folder, tmp_path / str(i))
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
            read_all(part)


def test_a_bit_flipped_anywhere(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    folder, model, _ = saved
    part = copy_of(folder, tmp_path / "part")
    choice = random.Random(0)
    expected = model(X)
    harmless = 0
    for name in parts(folder):
        content = (part / name).read_bytes()
        for _ in range(12):
            at = choice.randrange(len(content))
            flipped = bytearray(content)
            flipped[at] ^= 1 << choice.randrange(8)
            (part / name).write_bytes(flipped)
            try:
                y = read_all(part)(X)
            except CheckpointError:
                continue
            # only padding of a safetensors head, or white space of ours, can change without harm
            assert torch.equal(y, expected)
            harmless += 1
        (part / name).write_bytes(content)
    assert harmless < 12


def test_versions_and_features(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    cases = {
        "of format version 3, newer than this foveate reads (2): upgrade foveate": with_(version=3),
        "of format version 1, older than this foveate reads (2): quantize the original again": with_(version=1),
        "needs features that this foveate does not have: input_order, zero_mask: upgrade foveate": with_(
            features=["zero_mask", "input_order"]
        ),
        "exact tiles are listed without their feature, or the other way round": with_(features=["exact_tiles"]),
        "does not name the format": with_(format="other"),
        "is malformed": with_(version="1"),
    }
    for i, (message, change) in enumerate(cases.items()):
        part = copy_of(saved[0], tmp_path / str(i))
        rewrite(part, change)
        with pytest.raises(CheckpointError) as caught:
            fv.read_head(part)
        assert message in str(caught.value)
    # a newer version says so first, whatever its head looks like
    rewrite(part, lambda data: {"version": 9, "features": []} | {"format": "foveate"}, signed=False)
    with pytest.raises(CheckpointError, match="of format version 9"):
        fv.read_head(part)


def test_an_altered_head_is_noticed(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    part = copy_of(saved[0], tmp_path / "part")
    rewrite(part, with_(other_bytes=5), signed=False)
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
    part = copy_of(saved[0], tmp_path / "part")

    def change(data: Any) -> Any:
        data["files"]["plane0"]["file"] = name
        return data

    rewrite(part, change)
    with pytest.raises(CheckpointError, match="is malformed"):
        fv.load(part, model=skeleton())


@pytest.mark.parametrize("factors", [[1.0] * 5, [0.0] * 6, [-1.0] * 6, ["a"] * 6, [float("inf")] * 6, [10**400] * 6])
def test_factors_of_predictions_are_checked(
    saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path, factors: Any
) -> None:
    part = copy_of(saved[0], tmp_path / "part")

    def change(data: Any) -> Any:
        data["profile"]["measured_over_summed"] = factors
        return data

    rewrite(part, change)
    with pytest.raises(CheckpointError, match="is malformed"):
        fv.load_profile(part)


@pytest.mark.parametrize(
    "ranges", [5, {"nothing:input": [0, 1]}, {"0:input": [1, 0]}, {"0:input": ["a", 1]}, {"0:input": [0, 1e300]}]
)
def test_static_scales_that_make_no_sense(
    saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path, ranges: Any
) -> None:
    part = copy_of(saved[0], tmp_path / "part")
    rewrite(part, lambda data: {**data, "model": {**data["model"], "ranges": ranges}})
    with pytest.raises(CheckpointError, match="range"):
        fv.load(part, model=skeleton())


@pytest.mark.parametrize("exponent", [33, -65, 1.0, True, "1", None])
def test_an_exponent_that_does_not_exist_is_refused(
    saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path, exponent: Any
) -> None:
    part = copy_of(saved[0], tmp_path / "part")

    def change(data: Any) -> Any:
        next(site for site in data["sites"] if site["kind"] == "weight")["exponent"] = exponent
        return data

    rewrite(part, change)
    with pytest.raises(CheckpointError, match="an exponent of scales does not exist"):
        fv.load(part, model=skeleton())


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5),
    st.sampled_from(([], {}, [1], {"a": 1}, [[8, 10**12]], [["a"]], 0, 1, 2, 5, 32, 33, 10**9)),
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


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_malformed_head_is_a_checkpoint_error(
    saved: tuple[Path, nn.Module, fv.Profile], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder, model, _ = saved
    part = folder.parent / "mutated"
    if not part.exists():
        copy_of(folder, part)
    original = json.loads((folder / "foveate.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 2))):
        _mutate(original, data.draw)
    original.pop("sha256", None)
    (part / "foveate.json").write_text(json.dumps({**original, "sha256": head_checksum(original)}))
    try:
        loaded = read_all(part)
    except CheckpointError:
        return
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
    part = copy_of(saved[0], tmp_path / "part")
    (part / "foveate.json").write_bytes(text)
    with pytest.raises(CheckpointError):
        fv.load(part, model=skeleton())


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
        "gains of another shape": ("scales", "0:weight|gain", lambda t: t[:1]),
        "a profile of other tiles": ("profile", "0:weight|losses", lambda t: t[1:]),
        "a profile in 8 bits": ("profile", "0:weight|losses", lambda t: t.to(torch.float8_e4m3fn)),
        "a bias in 8 bits": ("rest", "0.bias", lambda t: t.to(torch.float8_e4m3fn)),
        "a bias of another shape": ("rest", "0.bias", lambda t: t[1:]),
    }
    for i, (what, (part, key, change)) in enumerate(changes.items()):
        made = copy_of(folder, tmp_path / str(i))
        head = json.loads((made / "foveate.json").read_bytes())
        file = made / head["files"][part]["file"]
        tensors = load(file.read_bytes())
        tensors[key] = change(tensors[key]).contiguous()
        save_file(tensors, file)
        head["files"][part]["sha256"][key] = checksum(tensors[key])
        rewrite(made, lambda data, head=head: head)
        with pytest.raises(CheckpointError):
            pytest.fail(f"{what} was loaded: {read_all(made)}")


def test_levels_and_maps_that_do_not_fit(saved: tuple[Path, nn.Module, fv.Profile]) -> None:
    folder = saved[0]
    with pytest.raises(LevelError, match=r"level \(=5\)"):
        fv.load(folder, keep=5, model=skeleton())
    with pytest.raises(SiteError, match="of another model"):
        fv.load(folder, keep=quantized_llama()[1].uniform(4), model=skeleton())
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

    rewrite(tmp_path / "llama", changed)
    with pytest.raises(CheckpointError):
        fv.load(tmp_path / "llama")


def test_ties_that_the_folder_does_not_have(tmp_path: Path) -> None:
    model, _ = quantized_llama(tie_word_embeddings=False)
    fv.save(model, tmp_path / "llama")

    def changed(data: Any) -> Any:
        data["model"]["config"]["tie_word_embeddings"] = True
        del data["files"]["rest"]["sha256"]["model.norm.weight"]
        return data

    rewrite(tmp_path / "llama", changed)
    with pytest.raises(CheckpointError, match="ties weights that the checkpoint does not"):
        fv.load(tmp_path / "llama")
