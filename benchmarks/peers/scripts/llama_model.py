"""A Llama of random weights in llama.cpp: written as GGUF, quantized by llama.cpp, decoded one token at a time.

It needs llama-cpp-python and gguf. Weights are in the process's own memory, not in a mapped file. So they can be on
huge pages, and llama.cpp can rearrange them for this processor, which is its default.

    {"do": "prepare", "folder": ..., "shape": {...}, "types": [...]} -> {"bytes": {type: bytes per token}}
    {"do": "load", "type": "Q4_K_S", "context": 640, "threads": 2}   -> {"system": what it was compiled for}
    {"do": "decode", "type": "Q4_K_S", "prompt": 8, "tokens": 32}    -> {"seconds": per token, ...}
    {"do": "prefill", "type": "Q4_K_S", "tokens": 512}               -> {"seconds": of the prompt}
"""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from answers import serve

EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class Shape:
    """The model's widths, layers, heads of queries and of keys and values, and size of the vocabulary."""

    width: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes, rows first."""
        kv = self.width // self.heads * self.kv_heads
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocabulary, self.width)}
        for i in range(self.layers):
            block = {
                "attn_norm": (self.width,),
                "attn_q": (self.width, self.width),
                "attn_k": (kv, self.width),
                "attn_v": (kv, self.width),
                "attn_output": (self.width, self.width),
                "ffn_norm": (self.width,),
                "ffn_gate": (self.intermediate, self.width),
                "ffn_up": (self.intermediate, self.width),
                "ffn_down": (self.width, self.intermediate),
            }
            shapes |= {f"blk.{i}.{name}.weight": sizes for name, sizes in block.items()}
        return shapes | {"output_norm.weight": (self.width,), "output.weight": (self.vocabulary, self.width)}


def write_f16(path: Path, shape: Shape, context: int = 2048) -> None:
    """Write the model with random weights in float16, norms of ones, and a vocabulary without words."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("none")
    writer.add_context_length(context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    generator = np.random.default_rng(0)
    for name, sizes in shape.tensors().items():
        if len(sizes) == 1:
            writer.add_tensor(name, np.ones(sizes, np.float32))
        else:
            random = generator.standard_normal(sizes, np.float32) / np.float32(np.sqrt(sizes[1]))
            writer.add_tensor(name, random.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantized(source: Path, target: Path, kind: str) -> None:
    """Quantize every matrix to one type, the output layer included."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.pure = True
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(parameters)):
        raise RuntimeError(f"llama.cpp could not quantize {source.name} to {kind}")


def bytes_read(path: Path) -> int:
    """Bytes that one token reads: all tensors, but only one row of the embedding."""
    return sum(int(t.n_bytes) // (int(t.shape[1]) if t.name == EMBEDDING else 1) for t in gguf.GGUFReader(path).tensors)


class Models:
    """The quantized files, and a context for each file that was loaded."""

    def __init__(self) -> None:
        llama_cpp.llama_backend_init()
        self.files: dict[str, Path] = {}
        self.contexts: dict[str, Any] = {}
        self.vocabulary = 0

    def prepare(self, folder: str, shape: dict[str, int], types: list[str]) -> dict[str, Any]:
        """Write the files that are missing. A file appears only when it is complete."""
        sizes = Shape(**shape)
        self.vocabulary = sizes.vocabulary
        stem = "-".join(str(v) for v in shape.values())
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.files = {kind: Path(folder) / f"{stem}-{kind}.gguf" for kind in types}
        missing = [kind for kind, path in self.files.items() if not path.exists()]
        if missing:
            source = Path(folder) / f"{os.getpid()}-F16.gguf"
            part = Path(folder) / f"{os.getpid()}-part.gguf"
            try:
                write_f16(source, sizes)
                for kind in missing:
                    quantized(source, part, kind)
                    os.replace(part, self.files[kind])
            finally:
                source.unlink(missing_ok=True)
                part.unlink(missing_ok=True)
        return {"bytes": {kind: bytes_read(path) for kind, path in self.files.items()}}

    def load(self, type: str, context: int, threads: int) -> dict[str, Any]:
        """Load a model, and keep it."""
        parameters = llama_cpp.llama_model_default_params()
        parameters.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        model = llama_cpp.llama_model_load_from_file(os.fsencode(self.files[type]), parameters)
        if not model:
            raise RuntimeError(f"llama.cpp could not load {self.files[type].name}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = threads
        settings.no_perf = True
        made = llama_cpp.llama_init_from_model(model, settings)
        if not made:
            raise RuntimeError(f"llama.cpp could not make a context for {self.files[type].name}")
        self.contexts[type] = made
        return {
            "system": llama_cpp.llama_print_system_info().decode(),
            "version": metadata.version("llama-cpp-python"),
        }

    def decode(self, type: str, prompt: int, tokens: int) -> dict[str, Any]:
        """Read a prompt, then choose the likeliest token `tokens` times; the seconds per token after the first."""
        context = self._cleared(type)
        token = self._read(context, _prompt(prompt, self.vocabulary))
        started = time.perf_counter()
        for _ in range(tokens):
            token = self._read(context, [token])
        return {"seconds": (time.perf_counter() - started) / tokens}

    def prefill(self, type: str, tokens: int) -> dict[str, Any]:
        """The seconds that a prompt takes until its first token."""
        context = self._cleared(type)
        started = time.perf_counter()
        self._read(context, _prompt(tokens, self.vocabulary))
        return {"seconds": time.perf_counter() - started}

    def _cleared(self, type: str) -> Any:
        context = self.contexts[type]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        return context

    def _read(self, context: Any, tokens: list[int]) -> int:
        """Read some tokens, and return the likeliest next one."""
        held = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(held, len(tokens))):
            raise RuntimeError(f"llama.cpp could not decode {len(tokens)} tokens")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), shape=(self.vocabulary,))
        return int(logits.argmax())


def _prompt(tokens: int, vocabulary: int) -> list[int]:
    return [(7919 * i + 1) % vocabulary for i in range(tokens)]


if __name__ == "__main__":
    here = Models()
    serve({"prepare": here.prepare, "load": here.load, "decode": here.decode, "prefill": here.prefill})
