"""Quantize a model in a fresh process: its seconds by phase, and the memory that it takes.

python -m foveate.bench.fresh_process.calibrate SIZES, a JSON object (`foveate.bench.calibrate.Calibrated`)
"""

from __future__ import annotations

import gc
import json
import logging
import sys
import time
from typing import Any

import psutil

from foveate.bench.fresh_process.forward import TIMED, float_model, spread_tokens, token_seconds
from foveate.bench.fresh_process.run import peak_memory, reset_peak_memory
from foveate.bench.shared.extras import require
from foveate.calibrate.need import rows_needed
from foveate.calibrate.passes.options import CalibrationOptions
from foveate.calibrate.quantize import quantize_with
from foveate.calibrate.smallest_map import widths_of
from foveate.kernels.backends.table import ensure_loaded
from foveate.progress import Bar


def measure(sizes: dict[str, Any]) -> dict[str, Any]:
    """Time forward passes, quantize the model, and time the forward passes again."""
    ensure_loaded()
    logging.getLogger("foveate").setLevel(logging.WARNING)
    package = require("transformers")
    package.LlamaForCausalLM  # noqa: B018  imports what building a model imports
    gc.collect()
    base = psutil.Process().memory_info().rss
    model = float_model(sizes)
    widths = [width for width, embedding in widths_of(model) if not embedding]
    needed, length = rows_needed(widths), sizes["length"]
    config: Any = model.config
    most = getattr(config, "max_position_embeddings", length)
    length = min(length, most)
    count = sizes["windows"] or -(-needed // length)
    windows = list(spread_tokens(sizes, count * length, config.vocab_size).view(count, 1, length))
    weights = sum(p.numel() for p in model.parameters())
    model_bytes = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    rounds = [token_seconds(model, windows[:TIMED])]
    gc.collect()
    reset_peak_memory()
    bar = Bar("quantizing", show=False)
    began, began_cpu = time.perf_counter(), time.process_time()
    batches = [{"input_ids": ids} for ids in windows]
    profile = quantize_with(model, batches, None, (), CalibrationOptions(progress=True), bar)
    seconds, seconds_cpu = time.perf_counter() - began, time.process_time() - began_cpu
    peak = peak_memory() - base
    del model
    gc.collect()
    rounds.append(token_seconds(float_model(sizes), windows[:TIMED]))
    return {
        "forward_token": sum(wall for wall, _ in rounds) / 2,
        "forward_token_cpu": sum(cpu for _, cpu in rounds) / 2,
        "forward_rounds": [wall for wall, _ in rounds],
        "calibrate": seconds,
        "calibrate_cpu": seconds_cpu,
        "seconds": bar.spent,
        "statistics": bar.spent.get("of it statistics", 0.0),
        "estimate": bar.expected,
        "peak": peak,
        "model_bytes": model_bytes,
        "weights": weights,
        "tokens": count * length,
        "batches": count,
        "length": length,
        "needed": needed,
        "samples": profile.samples,
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
