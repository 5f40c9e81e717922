"""Models in ik_llama.cpp, a fork of llama.cpp with kernels of its own for CPUs (`llama_engine.py` has the requests).

It needs ik-llama-cpp-python. The files are those that llama.cpp wrote. Weights are repacked for this processor at
loading, which mainline does by default and the fork on request.
"""

from __future__ import annotations

import ctypes
import os
from importlib import metadata
from pathlib import Path
from typing import Any

from answers import serve
from ik_llama_cpp import _ctypes_api as library
from llama_engine import Engine


def start(path: Path, context: int, threads: int, sequences: int) -> tuple[Any, Any]:
    """Load a file into memory, and make a context."""
    parameters = library.llama_model_default_params()
    parameters.use_mmap = False
    parameters.repack_tensors = True
    model = library.llama_model_load_from_file(os.fsencode(path), parameters)
    if not model:
        raise RuntimeError(f"ik_llama.cpp could not load {path.name}")
    settings = library.llama_context_default_params()
    settings.n_ctx = settings.n_batch = context
    settings.n_ubatch = min(context, 1024)
    settings.n_seq_max = sequences
    settings.n_threads = settings.n_threads_batch = threads
    made = library.llama_init_from_model(model, settings)
    if not made:
        raise RuntimeError(f"ik_llama.cpp could not make a context for {path.name}")
    return model, made


def about() -> dict[str, str]:
    """What it was compiled for, and its version."""
    system = library._lib.llama_print_system_info
    system.restype = ctypes.c_char_p
    return {"system": system().decode(), "version": metadata.version("ik-llama-cpp-python")}


if __name__ == "__main__":
    serve(Engine(library, start, library.llama_kv_cache_clear, about).handlers())
