"""GGUF models in llama.cpp or a fork of it: what both sides of their interface have in common.

A library is a module with the functions of `llama.h`. The forks differ in how a model is loaded and how the cache is
cleared, so a script hands in these two as functions.

    {"do": "load", "type": "Q4_K_S", "context": 640, "threads": 2, "sequences": 1}  ->  {"system": ..., "version": ...}
    {"do": "decode", "type": "Q4_K_S", "prompt": 8, "tokens": 32, "sequences": 1}   ->  {"seconds": of one step}
    {"do": "prefill", "type": "Q4_K_S", "tokens": 512}                              ->  {"seconds": of the prompt}
    {"do": "logits", "type": "Q4_K_S", "ids": [...], "out": FILE}                   ->  {}

A step decodes one token of every sequence. The file of logits is a numpy array, float32 [tokens, vocabulary].
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

#: A token, its position and its sequence.
Place = tuple[int, int, int]


class Engine:
    """Loaded models by type.

    Args:
        library: the module.
        start: `start(path, context, threads, sequences)` returns (model, context).
        clear: `clear(context)` empties the cache.
        about: what the library was compiled for, and its version.
    """

    def __init__(
        self,
        library: Any,
        start: Callable[[Path, int, int, int], tuple[Any, Any]],
        clear: Callable[[Any], None],
        about: Callable[[], Mapping[str, str]],
    ) -> None:
        self.library, self._start, self._clear, self._about = library, start, clear, about
        library.llama_backend_init()
        self.files: dict[str, Path] = {}
        self._loaded: dict[str, tuple[Any, int]] = {}

    def use(self, files: dict[str, str]) -> dict[str, Any]:
        """Take files that are there already, by type."""
        self.files |= {kind: Path(file) for kind, file in files.items()}
        return {}

    def load(self, type: str, context: int, threads: int, sequences: int = 1) -> dict[str, Any]:
        """Load a model, and keep it."""
        model, made = self._start(self.files[type], context * sequences, threads, sequences)
        vocabulary = self.library.llama_vocab_n_tokens(self.library.llama_model_get_vocab(model))
        self._loaded[type] = (made, vocabulary)
        return dict(self._about())

    def decode(self, type: str, prompt: int, tokens: int, sequences: int = 1) -> dict[str, Any]:
        """Read a prompt, then choose the likeliest token of each sequence `tokens` times."""
        context, vocabulary = self._cleared(type)
        ids = [self._read(context, vocabulary, _prompt(prompt, vocabulary, s))[-1] for s in range(sequences)]
        started = time.perf_counter()
        for step in range(tokens):
            ids = self._read(context, vocabulary, [(ids[s], prompt + step, s) for s in range(sequences)], every=True)
        return {"seconds": (time.perf_counter() - started) / tokens}

    def prefill(self, type: str, tokens: int) -> dict[str, Any]:
        """The seconds that a prompt takes until its first token."""
        context, vocabulary = self._cleared(type)
        started = time.perf_counter()
        self._read(context, vocabulary, _prompt(tokens, vocabulary, 0))
        return {"seconds": time.perf_counter() - started}

    def logits(self, type: str, ids: list[int], out: str) -> dict[str, Any]:
        """Write the logits after each of some tokens."""
        context, vocabulary = self._cleared(type)
        self._run(context, [(token, i, 0) for i, token in enumerate(ids)], every=True)
        rows = [np.array(self._row(context, vocabulary, i)) for i in range(len(ids))]
        np.save(out, np.stack(rows))
        return {}

    def evaluate(self, type: str, ids: Sequence[int]) -> None:
        """Read some tokens, all with logits, for whoever watches the ops."""
        self._run(self._cleared(type)[0], [(token, i, 0) for i, token in enumerate(ids)], every=True)

    def _cleared(self, type: str) -> tuple[Any, int]:
        context, vocabulary = self._loaded[type]
        self._clear(context)
        return context, vocabulary

    def _read(self, context: Any, vocabulary: int, places: Sequence[Place], *, every: bool = False) -> list[int]:
        """Read tokens, and return the likeliest one after each of them, or after the last only."""
        self._run(context, places, every)
        asked = range(len(places)) if every else (len(places) - 1,)
        return [int(self._row(context, vocabulary, i).argmax()) for i in asked]

    def _run(self, context: Any, places: Sequence[Place], every: bool) -> None:
        batch = self.library.llama_batch_init(len(places), 0, 1)
        try:
            batch.n_tokens = len(places)
            for i, (token, position, sequence) in enumerate(places):
                batch.token[i], batch.pos[i] = token, position
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
                batch.logits[i] = every or i == len(places) - 1
            if self.library.llama_decode(context, batch):
                raise RuntimeError(f"it could not decode {len(places)} tokens")
        finally:
            self.library.llama_batch_free(batch)

    def _row(self, context: Any, vocabulary: int, index: int) -> np.ndarray[Any, Any]:
        return np.ctypeslib.as_array(self.library.llama_get_logits_ith(context, index), shape=(vocabulary,))

    def handlers(self) -> dict[str, Callable[..., Mapping[str, Any]]]:
        """The requests that an engine answers, by name."""
        return {
            "use": self.use,
            "load": self.load,
            "decode": self.decode,
            "prefill": self.prefill,
            "logits": self.logits,
        }


def _prompt(tokens: int, vocabulary: int, sequence: int) -> list[Place]:
    return [((7919 * i + 1 + sequence) % vocabulary, i, sequence) for i in range(tokens)]
