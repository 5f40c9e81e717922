"""Data for calibration and measurement: a text or token ids, cut into windows, of which a part can be held out.

A model that predicts the next token gets windows of one length, spread evenly over the whole text. An embedding model
gets lines of the text: each line is one sample, padded and masked.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from foveate.cli.shared.console import log
from foveate.cli.shared.models import config_of, is_causal, load_tokenizer
from foveate.errors import DataError

#: For this many windows of calibration, one more window is held out.
HELD_OUT = 8
_LENGTH = 512
#: How many lines tell how long lines are.
_LINES_COUNTED = 128
#: Windows on which inputs that choose find their price, tokens of one, windows of a batch, and tokens at the least.
_PRICE_WINDOWS, _PRICE_LENGTH, _PRICE_BATCH, _LEAST_PRICE_LENGTH = 32, 128, 8, 16
Window = dict[str, Tensor]


@dataclass(frozen=True)
class Request:
    """The data that the options ask for. Exactly one of `text` and `tokens` is needed.

    Attributes:
        text, tokens: the file that holds the data.
        samples: windows, or lines for an embedding model; as many as have `rows` tokens if not given.
        length: tokens in a window; 512 or the model's limit if not given.
        batch: windows in a batch; as many as have about 512 tokens if not given.
        rows: how many tokens are needed, where `samples` is not given.
    """

    text: Path | None
    tokens: Path | None
    samples: int | None
    length: int | None
    batch: int | None
    rows: int = 0

    @property
    def given(self) -> bool:
        """Whether the options name any data."""
        return self.text is not None or self.tokens is not None


def next_token_loss(output: Any, batch: Window) -> Tensor:
    """The negative log-likelihood of each next token in nats: [n]."""
    logits_BSV, ids_BS = output.logits, batch["input_ids"]
    return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1).float(), ids_BS[:, 1:].flatten(), reduction="none")


def check_given(request: Request) -> None:
    """Raise `DataError` unless the options name exactly one file of data."""
    if not request.given:
        raise DataError("there are no data: give --data FILE.txt, or --tokens FILE.npy or .safetensors")
    if request.text is not None and request.tokens is not None:
        raise DataError("give --data or --tokens, not both")


def windows(request: Request, name: str, config: Any, *, more: float = 0.0) -> list[Window]:
    """Single windows, `input_ids` [1, S] (and `attention_mask` for lines), spread evenly over the data.

    Args:
        request: the options.
        name: folder or hub name of the model whose tokenizer is used.
        config: its configuration.
        more: how many windows to add to `request.samples`, as a share of that number.

    Raises:
        DataError: no data, or data that do not fit the model; the message says what to give.
    """
    check_given(request)
    length = _window_length(request.length, config)
    count = request.samples or math.ceil(request.rows / length)
    wanted = count + math.ceil(more * count)
    if request.tokens is not None:
        samples = _cut(_read_tokens(request.tokens), length)
        return _checked([{"input_ids": w[None]} for w in _spread(samples, wanted)], config, request.tokens)
    assert request.text is not None
    text = _read_text(request.text)
    tokenizer = load_tokenizer(name)
    if is_causal(config):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        samples = _cut(torch.tensor(ids, dtype=torch.int64), length)
        return _checked([{"input_ids": w[None]} for w in _spread(samples, wanted)], config, request.text)
    every = [line for line in text.splitlines() if line.strip()]
    if request.samples is None:
        some = _spread(every, _LINES_COUNTED)
        each = sum(len(tokenizer(line, truncation=True, max_length=length)["input_ids"]) for line in some) / len(some)
        wanted = math.ceil((1 + more) * request.rows / max(each, 1.0))
    lines = _spread(every, wanted)
    encoded = [tokenizer(line, truncation=True, max_length=length)["input_ids"] for line in lines]
    made = [
        {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
        for ids in encoded
    ]
    return _checked(made, config, request.text)


def split(samples: Sequence[Window]) -> tuple[list[Window], list[Window]]:
    """(calibration, held out): about one window in nine is held out, and at least one.

    Raises:
        DataError: fewer than two windows.
    """
    if len(samples) < 2:
        raise DataError(f"{len(samples)} windows cannot be split: give more data, or a smaller --length")
    every = min(HELD_OUT + 1, len(samples))
    held_out = [w for i, w in enumerate(samples) if i % every == every - 1]
    return [w for i, w in enumerate(samples) if i % every != every - 1], held_out


def batches(samples: Sequence[Window], size: int | None = None) -> list[Window]:
    """Batches of `size` windows; lines of different lengths are padded. By default a batch has about 512 tokens."""
    if size is None:
        size = max(1, _LENGTH * len(samples) // max(sum(w["input_ids"].shape[1] for w in samples), 1))
    made = []
    for start in range(0, len(samples), size):
        part = samples[start : start + size]
        longest = max(w["input_ids"].shape[1] for w in part)
        made.append({key: torch.cat([F.pad(w[key], (0, longest - w[key].shape[1])) for w in part]) for key in part[0]})
    return made


def price_batches(text: Path, out: Path) -> list[Window]:
    """Batches of a text on which inputs that choose find the price of a byte.

    Args:
        text: the text file.
        out: the folder of the model.
    """
    ids = load_tokenizer(str(out))(_read_text(text), add_special_tokens=False, verbose=False)["input_ids"]
    length = min(_PRICE_LENGTH, positions_of(config_of(str(out))) or _PRICE_LENGTH, len(ids))
    if length < _LEAST_PRICE_LENGTH:
        raise DataError(
            f"{text} has {len(ids)} tokens, too few to find the price of a byte on: at least {_LEAST_PRICE_LENGTH}"
        )
    cut = _cut(torch.tensor(ids, dtype=torch.int64), length)
    return batches([{"input_ids": w[None]} for w in _spread(cut, _PRICE_WINDOWS)], _PRICE_BATCH)


def describe(samples: Sequence[Window]) -> str:
    """`128 windows of 512 tokens`."""
    lengths = {w["input_ids"].shape[1] for w in samples}
    if len(lengths) == 1:
        return f"{len(samples)} window{'s' * (len(samples) != 1)} of {lengths.pop()} tokens"
    return f"{len(samples)} lines of {min(lengths)} to {max(lengths)} tokens"


def digest(samples: Sequence[Window]) -> str:
    """The first 12 hex digits of the SHA-256 of these data."""
    sha = hashlib.sha256()
    for window in samples:
        sha.update(str(window["input_ids"].tolist()).encode())
    return sha.hexdigest()[:12]


def positions_of(config: Any) -> int | None:
    """How many positions a model has; None if its configuration does not say."""
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return most if isinstance(most, int) else None


def _window_length(length: int | None, config: Any) -> int:
    most = positions_of(config)
    if most is None:
        return length or _LENGTH
    if length is not None and length > most:
        raise DataError(f"length (={length}) is more than the {most} positions of the model")
    return length or min(_LENGTH, most)


def _cut(ids: Tensor, length: int) -> list[Tensor]:
    """Windows of a stream of tokens; rows that are no longer than a window are used as they are."""
    if ids.dim() == 2 and ids.shape[1] <= length:
        return list(ids)
    rows = ids if ids.dim() == 2 else ids[None]
    samples = [row[i : i + length] for row in rows for i in range(0, len(row) - length + 1, length)]
    if not samples:
        raise DataError(
            f"{ids.numel()} tokens are less than one window of {length}: give more data, or a smaller --length"
        )
    return samples


def _spread(samples: Sequence[Any], wanted: int) -> list[Any]:
    """`wanted` items, evenly spread; all items if there are fewer."""
    if len(samples) <= wanted:
        if len(samples) < wanted:
            log.info("the data give only %d of the %d samples asked for", len(samples), wanted)
        return list(samples)
    return [samples[i * len(samples) // wanted] for i in range(wanted)]


def _checked(samples: list[Window], config: Any, file: Path) -> list[Window]:
    vocabulary = getattr(config, "vocab_size", None)
    if not samples:
        raise DataError(f"{file} holds no usable data")
    ids = torch.cat([w["input_ids"].flatten() for w in samples])
    if int(ids.min()) < 0 or (isinstance(vocabulary, int) and int(ids.max()) >= vocabulary):
        raise DataError(f"{file} holds token {int(ids.max())}, and the model knows 0 to {(vocabulary or 0) - 1}")
    return samples


def _read_text(file: Path) -> str:
    if not file.is_file():
        raise DataError(f"there is no file {file}")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not text in UTF-8 ({error.reason} at byte {error.start})") from error


def _read_tokens(file: Path) -> Tensor:
    """int64 [n] or [rows, n]."""
    if not file.is_file():
        raise DataError(f"there is no file {file}")
    if file.suffix == ".npy":
        import numpy

        try:
            array = numpy.load(file, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise DataError(f"{file} cannot be read: {error}") from error
        if array.dtype.kind not in "iu":
            raise DataError(f"{file} holds {array.dtype}, not token ids")
        ids = torch.from_numpy(array.astype("int64"))
    elif file.suffix == ".safetensors":
        ids = _only_tensor(file)
    else:
        raise DataError(f"--tokens {file} is neither .npy nor .safetensors")
    if ids.dim() not in (1, 2) or not ids.numel():
        raise DataError(f"{file} holds a tensor of shape {list(ids.shape)}: [tokens] or [windows, tokens] is needed")
    return ids


def _only_tensor(file: Path) -> Tensor:
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    candidates = [tensors[key] for key in ("input_ids", "tokens") if key in tensors] or list(tensors.values())
    if len(candidates) != 1:
        raise DataError(f"{file} holds {len(tensors)} tensors: one, or one called input_ids or tokens, is needed")
    if candidates[0].is_floating_point() or candidates[0].dtype == torch.bool:
        raise DataError(f"{file} holds {candidates[0].dtype}, not token ids")
    return candidates[0].long()
