"""Decoding in a fresh process: the memory that it takes, and the memory that is computed for it.

python -m foveate.bench.fresh_process.decode FOLDER THREADS PROMPT TOKENS
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any, cast

import psutil
import torch

import foveate
from foveate.bench.decode import generate
from foveate.bench.fresh_process.run import peak_memory, reset_peak_memory
from foveate.bench.shared.random_model import random_llama

_FLOAT = 4


def _cache_bytes(config: Any, positions: int) -> int:
    """The bytes of keys and values in float32."""
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    return cast(int, 2 * config.num_hidden_layers * width * positions * _FLOAT)


def _activation_bytes(config: Any, rows: int) -> int:
    """The bytes of one feed-forward block (inputs, outputs, residuals) for the prompt, and of two rows of logits."""
    wide = 3 * config.intermediate_size + 4 * config.hidden_size
    return cast(int, (rows * wide + 2 * config.vocab_size) * _FLOAT)


def measure(folder: Path, threads: int, prompt: int, tokens: int) -> dict[str, int]:
    """Load and decode, and return the measured peak of memory with the computed bytes."""
    torch.set_num_threads(threads)
    tiny = random_llama(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=64)
    generate(tiny, prompt, tokens)  # imports and starts what any decoding needs
    gc.collect()
    before = psutil.Process().memory_info().rss
    model = foveate.load(folder)
    gc.collect()
    reset_peak_memory()
    generate(model, prompt, tokens)
    highest = peak_memory() - before
    plan = foveate.current_map(model)
    return {
        "peak": highest,
        "weights": plan.bytes_resident,
        "cache": _cache_bytes(model.config, prompt + tokens),
        "activations": _activation_bytes(model.config, prompt),
    }


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
