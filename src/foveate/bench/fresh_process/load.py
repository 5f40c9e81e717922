"""One load in a fresh process: its seconds, the bytes that it reads, and its memory.

python -m foveate.bench.fresh_process.load FOLDER MAP.json
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

import foveate
from foveate.bench.fresh_process.run import peak_memory, reset_peak_memory
from foveate.bench.shared.extras import require
from foveate.kernels.backends.table import ensure_loaded


def _io() -> int | None:
    """The bytes that this process has read from the disk so far, or None where the system does not report them."""
    process = psutil.Process()
    return int(process.io_counters().read_bytes) if hasattr(process, "io_counters") else None


def measure(folder: Path, plan_file: Path) -> dict[str, Any]:
    """Load a folder's model by a map, and return the seconds, the bytes read, and the growth of memory."""
    head = foveate.read_head(folder)
    plan = foveate.PrecisionMap.from_json(json.loads(plan_file.read_text()), head.sites, head.other_bytes)
    ensure_loaded()
    config = require("transformers").LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=64
    )
    with torch.device("meta"):
        require("transformers").LlamaForCausalLM(config)  # imports what building any model imports
    gc.collect()
    memory = psutil.Process().memory_info
    reset_peak_memory()
    before, read, started = memory().rss, _io(), time.perf_counter()
    model = foveate.load(folder, keep=plan)
    seconds = time.perf_counter() - started
    highest, after_read = peak_memory() - before, _io()
    gc.collect()
    resident = memory().rss - before
    names = len(list(model.modules()))
    return {
        "seconds": seconds,
        "read": None if read is None or after_read is None else after_read - read,
        "peak": highest,
        "resident": resident,
        "modules": names,
    }


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), Path(sys.argv[2]))))
