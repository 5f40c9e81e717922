"""llama.cpp with the types that are compared, in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.peers.child import Child
from foveate.bench.shared.extras import require

TYPES = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M")
#: llama.cpp's names of a block's matrices, by transformers'.
_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Peer(Protocol):
    """The same model in another library, in several types.

    Attributes:
        types: their names.
        bytes: for each type, the bytes that a token reads.
        notes: sentences about the peer for a reader of the figures.
    """

    types: Sequence[str]
    bytes: Mapping[str, int]
    notes: tuple[str, ...]

    def logits(self, kind: str, ids_T: Tensor) -> Tensor:
        """The logits after each of some tokens, float32 [T, V]."""

    def decode(self, kind: str, prompt: int, tokens: int) -> float:
        """Seconds a token, after the first."""


def tensor_name(module: str) -> str | None:
    """llama.cpp's name of a linear layer of a Llama in transformers; None for the output layer."""
    _, found, rest = module.partition("layers.")
    number, _, part = rest.partition(".")
    return f"blk.{number}.{_TENSORS[part]}.weight" if found and part in _TENSORS else None


class LlamaCpp:
    """llama.cpp; a `Peer`.

    Args:
        child: `scripts/llama_model.py`.
        source: the GGUF file that the types are made from.
        folder: where the files of the types are kept.
        context: the most tokens of a sequence.
        threads: the number of threads.
        importance: the mean squares of each layer's inputs by the name of its module, for llama.cpp's importance
            matrix; none if empty.
    """

    def __init__(
        self, child: Child, source: Path, folder: Path, context: int, threads: int, importance: Mapping[str, Tensor]
    ) -> None:
        self._child = child
        self.types: Sequence[str] = TYPES
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            matrix = None
            if importance:
                matrix = str(Path(scratch) / "importance.npz")
                named = {tensor_name(name): energy.numpy() for name, energy in importance.items()}
                require("numpy").savez(matrix, **{name: energy for name, energy in named.items() if name})
            answer = child.ask(
                "quantize", folder=str(folder.absolute()), source=str(source), types=list(TYPES), importance=matrix
            )
        self.bytes: Mapping[str, int] = answer["bytes"]
        about: dict[str, Any] = {}
        for kind in TYPES:
            about = child.ask("load", type=kind, context=context, threads=threads)
        self.notes: tuple[str, ...] = (
            f"llama.cpp: llama-cpp-python {about['version']}, {about['system'].strip(' |')}, "
            f"{'with' if importance else 'without'} an importance matrix",
        )

    def logits(self, kind: str, ids_T: Tensor) -> Tensor:
        """The logits after each of some tokens, float32 [T, V]."""
        numpy = require("numpy")
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "logits.npy"
            self._child.ask("logits", type=kind, ids=ids_T.tolist(), out=str(file))
            return torch.from_numpy(numpy.load(file, allow_pickle=False))

    def decode(self, kind: str, prompt: int, tokens: int) -> float:
        """Seconds a token, after the first."""
        return float(self._child.ask("decode", type=kind, prompt=prompt, tokens=tokens)["seconds"])
