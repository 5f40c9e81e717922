"""Models in llama.cpp, quantized by llama.cpp: a Llama of random weights, or a GGUF file.

It needs llama-cpp-python and gguf. Weights are in the process's own memory, not in a mapped file. So they can be on
huge pages, and llama.cpp can rearrange them for this processor, which is its default.

    {"do": "prepare", "folder": ..., "shape": {...}, "types": [...]}  ->  {"bytes": {type: of a token}, "files": {...}}
    {"do": "quantize", "folder": ..., "source": FILE, "types": [...], "importance": FILE or null}  ->  the same

`prepare` quantizes every matrix to one type. `quantize` mixes types as llama.cpp's own recipes do; `importance` holds
the mean squares of each matrix's inputs by name (npz). `llama_engine.py` has the other requests.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from answers import serve
from llama_engine import Engine

EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"


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
    parameters.pure = True
    _quantize(source, target, kind, parameters)


def requantized(source: Path, target: Path, kind: str, importance: str | None, threads: int = 0) -> None:
    """Quantize a file, whose own weights may be quantized, by llama.cpp's recipe for a type; 0 threads are all."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread = threads
    parameters.allow_requantize = True
    kept: list[Any] = []  # what the C side points to
    if importance is not None:
        entry = llama_cpp.llama_cpp.llama_model_imatrix_data
        with np.load(importance, allow_pickle=False) as held:
            kept = [(name.encode(), np.ascontiguousarray(held[name], np.float32)) for name in held.files]
        floats = ctypes.POINTER(ctypes.c_float)
        entries = [entry(name, energy_K.ctypes.data_as(floats), energy_K.size) for name, energy_K in kept]
        parameters.imatrix = (entry * (len(kept) + 1))(*entries, entry(None, None, 0))
    _quantize(source, target, kind, parameters)


def _quantize(source: Path, target: Path, kind: str, parameters: Any) -> None:
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(parameters)):
        raise RuntimeError(f"llama.cpp could not quantize {source.name} to {kind}")


def bytes_read(path: Path) -> int:
    """Bytes that one token reads: all tensors, but only one row of an embedding that is not the output layer too."""
    tensors = gguf.GGUFReader(path).tensors
    tied = all(t.name != OUTPUT for t in tensors)
    return sum(int(t.n_bytes) // (int(t.shape[1]) if t.name == EMBEDDING and not tied else 1) for t in tensors)


def start(path: Path, context: int, threads: int, sequences: int, watch: Any = None) -> tuple[Any, Any]:
    """Load a file into memory, and make a context; `watch` is its callback before and after each op (`cb_eval`)."""
    parameters = llama_cpp.llama_model_default_params()
    parameters.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), parameters)
    if not model:
        raise RuntimeError(f"llama.cpp could not load {path.name}")
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = context
    settings.n_ubatch = min(context, 1024)
    settings.n_seq_max = sequences
    settings.n_threads = settings.n_threads_batch = threads
    settings.no_perf = True
    if watch is not None:
        settings.cb_eval = watch
    made = llama_cpp.llama_init_from_model(model, settings)
    if not made:
        raise RuntimeError(f"llama.cpp could not make a context for {path.name}")
    return model, made


def clear(context: Any) -> None:
    """Empty a context's cache."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)


def about() -> dict[str, str]:
    """What llama.cpp was compiled for, and its version."""
    return {
        "system": llama_cpp.llama_print_system_info().decode(),
        "version": metadata.version("llama-cpp-python"),
    }


class Models:
    """The quantized files of an engine."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def prepare(self, folder: str, shape: dict[str, int], types: list[str]) -> dict[str, Any]:
        """Write files with random weights, those that are missing."""
        source = Path(folder) / f"{os.getpid()}-F16.gguf"
        sizes = Shape(**shape)

        def write(target: Path, kind: str) -> None:
            if not source.exists():
                write_f16(source, sizes)
            quantized(source, target, kind)

        try:
            return self._written(Path(folder), "-".join(str(v) for v in shape.values()), types, write)
        finally:
            source.unlink(missing_ok=True)

    def quantize(self, folder: str, source: str, types: list[str], importance: str | None = None) -> dict[str, Any]:
        """Quantize a file to every type, those that are missing."""
        stem = Path(source).stem + ("-imatrix" if importance else "")
        return self._written(
            Path(folder), stem, types, lambda target, kind: requantized(Path(source), target, kind, importance)
        )

    def _written(self, folder: Path, stem: str, types: list[str], write: Callable[[Path, str], None]) -> dict[str, Any]:
        """Write the files that are missing. A file appears only when it is complete."""
        folder.mkdir(parents=True, exist_ok=True)
        files = {kind: folder / f"{stem}-{kind}.gguf" for kind in types}
        part = folder / f"{os.getpid()}-part.gguf"
        try:
            for kind in types:
                if not files[kind].exists():
                    write(part, kind)
                    os.replace(part, files[kind])
        finally:
            part.unlink(missing_ok=True)
        held = {kind: str(file) for kind, file in files.items()}
        self.engine.use(held)
        return {"bytes": {kind: bytes_read(file) for kind, file in files.items()}, "files": held}


if __name__ == "__main__":
    engine = Engine(llama_cpp, start, clear, about)
    here = Models(engine)
    serve({"prepare": here.prepare, "quantize": here.quantize, **engine.handlers()})
