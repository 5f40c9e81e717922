"""The models of the benchmark: a small mixture of experts, and a dense model of the same family, that read bytes.

Both are trained by the benchmark on four texts in equal parts: stories, an encyclopedia, C, and Shakespeare. A trained
model is kept under the user's cache folder, by a digest of everything that decides what is learnt. The training of the
mixture takes a few minutes of one core.

Shapes: B windows a step, S bytes a window.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.bench.shared.extras import require
from foveate.errors import CheckpointError, DataError
from foveate.files.kept_model import keep_model, kept_path, restore_model
from foveate.kernels.backends.cpu.compiled import cache_folder
from foveate.kernels.threads import threads
from foveate.progress import say, track

#: The texts by name: the file to train on, and the file that a stream is read from.
TEXTS: Mapping[str, tuple[str, str]] = {
    "stories": ("tinystories_train_head2MiB.txt", "tinystories_train_head2MiB.txt"),
    "encyclopedia": ("wikitext2_valid.txt", "wikitext2_test.txt"),
    "c": ("linux_c_train.txt", "linux_c_test.txt"),
    "shakespeare": ("tinyshakespeare.txt", "tinyshakespeare.txt"),
}
#: The share at the end of a file that is not trained on where both are one file.
_HELD_OUT = 0.2
_VALUES = 256


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a model learns; the cache is keyed by it.

    Attributes:
        experts: experts in each layer, of which each token takes two; 0 for a dense model.
        width, hidden, layers, heads: the shape of the model; `hidden` is of one expert.
        window, batch, steps: bytes of a window, windows a step, steps.
        rate: the greatest learning rate.
        seed: of the weights and of the order of windows.
    """

    experts: int = 8
    width: int = 128
    hidden: int = 96
    layers: int = 2
    heads: int = 4
    window: int = 96
    batch: int = 8
    steps: int = 320
    rate: float = 5e-3
    seed: int = 0


#: The mixture, and the dense model beside it, whose layers compute as much as two experts.
MIXTURE = Recipe()
DENSE = Recipe(experts=0, hidden=192)


@dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """One text as bytes: uint8 [n] to train on, and uint8 [m] that was not trained on."""

    train: Tensor
    held_out: Tensor


def texts(folder: Path | None = None) -> dict[str, Text]:
    """Read the four texts of `TEXTS`.

    Args:
        folder: where they are; by default the folder `text` of the folder that the variable `FOVEATE_DATA` names.

    Raises:
        DataError: the variable is not set, or a text is missing or short.
    """
    if folder is None:
        root = os.environ.get("FOVEATE_DATA")
        if not root:
            raise DataError("this benchmark reads texts: set FOVEATE_DATA to a folder that has them in text/")
        folder = Path(root) / "text"
    found = {}
    for name, (train, held_out) in TEXTS.items():
        first, second = (_bytes_of(folder / file) for file in (train, held_out))
        if train == held_out:
            cut = int(len(first) * (1 - _HELD_OUT))
            first, second = first[:cut], first[cut:]
        found[name] = Text(train=first, held_out=second)
    return found


def _bytes_of(file: Path) -> Tensor:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"the text {file} cannot be read: {error}") from error
    if len(content) < 1 << 15:
        raise DataError(f"the text {file} has {len(content)} bytes, too few to learn from")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """`count` windows from anywhere in a text: int64 [count, length]."""
    starts = torch.randint(0, len(text) - length, (count,), generator=generator)
    return text[starts[:, None] + torch.arange(length)].long()


def new_model(recipe: Recipe) -> nn.Module:
    """An untrained model of the recipe's shape: Mixtral, or Llama where it has no experts.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    transformers = require("transformers")
    shape: dict[str, Any] = {
        "vocab_size": _VALUES,
        "hidden_size": recipe.width,
        "intermediate_size": recipe.hidden,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.heads,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if recipe.experts:
            shape |= {"num_local_experts": recipe.experts, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.002}
            model: nn.Module = transformers.MixtralForCausalLM(transformers.MixtralConfig(**shape))
        else:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    return model


def default_cache() -> Path:
    """`foveate/bench` under the user's cache folder."""
    return cache_folder() / "bench"


def trained(recipe: Recipe, sources: Mapping[str, Text], cache: Path) -> nn.Module:
    """The model of a recipe in evaluation mode: from the cache, or trained now and put there.

    Args:
        recipe: what to train.
        sources: the texts, which are trained on in equal parts.
        cache: the folder that keeps trained models.
    """
    digest = hashlib.sha256()
    for text in sources.values():
        digest.update(text.train.numpy().data)
    identity = json.dumps({"recipe": asdict(recipe), "texts": digest.hexdigest()}, sort_keys=True)
    path = kept_path(cache, "importance", identity)
    model = new_model(recipe)
    if path.exists():
        try:
            restore_model(model, path, identity)
            return model.eval()
        except CheckpointError as error:
            say(f"{error}; training anew")
    train(model, recipe, [text.train for text in sources.values()])
    keep_model(model, path, identity, {})
    return model.eval()


def train(model: nn.Module, recipe: Recipe, sources: Sequence[Tensor]) -> None:
    """Train a model in place, on windows of all texts in turn.

    With one thread: the model is so small that threads gain nothing, and on a busy machine they wait for each other.
    """
    with threads(1):
        _train(model, recipe, sources)


def _train(model: nn.Module, recipe: Recipe, sources: Sequence[Tensor]) -> None:
    model.train()
    generator = torch.Generator().manual_seed(recipe.seed)
    adam = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    each = max(1, recipe.batch // len(sources))
    for step in track(range(recipe.steps), "training"):
        done = step / recipe.steps
        for group in adam.param_groups:
            group["lr"] = recipe.rate * min(1.0, (step + 1) / 40) * (1 - done)
        batch_BS = torch.cat([windows(text, each, recipe.window + 1, generator) for text in sources])
        output = model(batch_BS[:, :-1], use_cache=False, **_with_routers(recipe))
        loss = F.cross_entropy(output.logits.flatten(0, 1), batch_BS[:, 1:].flatten())
        if recipe.experts:
            loss = loss + 0.002 * output.aux_loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        model.zero_grad(set_to_none=True)


def _with_routers(recipe: Recipe) -> dict[str, Any]:
    return {"output_router_logits": True} if recipe.experts else {}
