import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import foveate as fv
from foveate.cli import demo
from foveate.cli.demo import cache
from foveate.cli.demo.cache import trained
from foveate.cli.demo.corpus import Corpus, corpus, windows
from foveate.cli.demo.training import Progress, Recipe, new_model, orthogonal, train

TINY = Recipe(width=64, hidden=128, layers=1, heads=2, window=48, batch=4, steps=12, seconds=60)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    root = tmp_path_factory.mktemp("library")
    for i in range(32):
        (root / f"module{i:02}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 300)
    (root / "test").mkdir()
    (root / "test" / "skipped.py").write_text("NEVER READ")
    return corpus(root)


class Notices(list[str]):
    def __call__(self, said: str) -> None:
        self.append(said)


def ignore(at: Progress) -> None:
    pass


def test_the_whole_demo_with_json_keeps_stdout_for_one_object(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    demo.run(out=out, cache=tmp_path / "cache", json_output=True, recipe=TINY)
    said = capsys.readouterr()
    result = json.loads(said.out)
    figures = result["figures"]
    assert figures["outputs_identical"] == 1
    assert figures["bytes_moved"] == 0
    assert [s["level"] for s in result["switches"]] == [2, 8]
    assert figures["bytes_resident_b2"] < figures["bytes_resident_b8"] < figures["bytes_resident_float32"]
    assert figures["kl_float32"] == 0
    assert figures["kl_b8"] < figures["kl_b2"]
    assert figures["loss_float32"] < 5.6
    assert figures["allocated_over_uniform_kl"] == pytest.approx(figures["kl_allocated"] / figures["kl_uniform"])
    assert not result["cached"]
    for number in range(1, 8):
        assert f"\n{number} " in said.err
    assert "<!DOCTYPE html>" in (out / "report.html").read_text(encoding="utf-8")
    assert fv.read_head(out).plan.bits <= 4.25

    demo.run(out=out, cache=tmp_path / "cache", json_output=False, recipe=TINY)
    said = capsys.readouterr()
    assert "trained earlier" in " ".join(said.out.split())
    assert "\x1b[" not in said.out
    assert len(said.out.splitlines()) < 90
    assert said.out.rstrip().splitlines()[-1].startswith("Your model:")


def test_an_impossible_folder_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(fv.CheckpointError, match="is a file"):
        demo.run(out=tmp_path / "file", cache=tmp_path / "cache", json_output=False, recipe=TINY)
    assert not (tmp_path / "cache").exists()


def test_a_kept_model_is_used_again(tmp_path: Path, text: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    notices = Notices()
    first = trained(TINY, text, tmp_path, watch=ignore, notice=notices)

    def never(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(cache, "train", never)
    second = trained(TINY, text, tmp_path, watch=ignore, notice=notices)
    assert second.cached
    assert not first.cached
    assert second.steps == first.steps == TINY.steps
    assert notices == []
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    x = windows(text.held_out, 2, 16, torch.Generator().manual_seed(0))
    assert torch.equal(first.model(x).logits, second.model(x).logits)
    with pytest.raises(AssertionError, match="trained again"):
        trained(replace(TINY, seed=1), text, tmp_path, watch=ignore, notice=notices)


@pytest.mark.parametrize("harm", ["garbage", "truncated", "one bit"])
def test_a_damaged_kept_model_is_trained_anew_with_a_notice(tmp_path: Path, text: Corpus, harm: str) -> None:
    notices = Notices()
    trained(TINY, text, tmp_path, watch=ignore, notice=notices)
    (kept,) = tmp_path.iterdir()
    content = bytearray(kept.read_bytes())
    content[-1000] ^= 1
    kept.write_bytes({"garbage": b"no tensors", "truncated": content[:-5000], "one bit": content}[harm])
    again = trained(TINY, text, tmp_path, watch=ignore, notice=notices)
    assert not again.cached
    assert len(notices) == 1
    assert str(kept) in notices[0]
    assert "training anew" in notices[0]
    assert trained(TINY, text, tmp_path, watch=ignore, notice=notices).cached


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path: Path, text: Corpus) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    notices = Notices()
    assert trained(TINY, text, blocked / "cache", watch=ignore, notice=notices).steps == TINY.steps
    assert len(notices) == 1
    assert "could not be kept" in notices[0]


def test_the_clock_ends_training_on_a_slow_machine(text: Corpus) -> None:
    seen: list[Progress] = []
    recipe = replace(TINY, steps=10**9, seconds=1.0)
    result = train(new_model(recipe), recipe, text, seen.append)
    assert 1 <= result.seconds < 10
    assert seen[-1].done == 1
    assert seen[-1].left == 0
    assert [p.done for p in seen] == sorted(p.done for p in seen)


def test_training_learns_and_leaves_the_number_of_threads_alone(text: Corpus) -> None:
    before, seen = torch.get_num_threads(), list[Progress]()
    recipe = replace(TINY, steps=60)
    train(new_model(recipe), recipe, text, seen.append)
    assert torch.get_num_threads() == before
    assert seen[0].loss == pytest.approx(torch.tensor(256.0).log().item(), abs=0.3)
    assert seen[-1].loss < 3.5


def test_the_corpus_keeps_files_apart(text: Corpus) -> None:
    assert (text.train_files, text.held_out_files) == (30, 2)
    both = bytes(text.train.tolist()) + bytes(text.held_out.tolist())
    assert b"NEVER READ" not in both
    held_out = bytes(text.held_out.tolist())
    assert b"def f8(" in held_out
    assert b"def f8(" not in bytes(text.train.tolist())


def test_a_library_without_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("x = 1\n")
    with pytest.raises(fv.DataError, match="too little to learn from"):
        corpus(tmp_path)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.default_cache() == Path("/somewhere/foveate/demo")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.default_cache() == Path.home() / ".cache" / "foveate" / "demo"


@pytest.mark.parametrize("shape", [(2, 24, 24), (1, 16, 64), (3, 64, 16)])
def test_orthogonal_brings_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(g))
    # the attractor of the quintic is about 0.7 to 1.15 (Jordan 2024)
    assert float(values.max()) < 1.25
    assert float(values.median()) > 0.65
    rotation = torch.linalg.svd(g, full_matrices=False)
    assert float((orthogonal(g) * (rotation.U @ rotation.Vh)).sum((-2, -1)).min()) > 0.6 * min(shape[1:])
