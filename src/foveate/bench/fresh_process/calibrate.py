"""Quantize a model in a fresh process: its seconds by phase, and the memory that it takes.

python -m foveate.bench.fresh_process.calibrate SIZES, a JSON object (`foveate.bench.calibrate.Calibrated`)
"""

from __future__ import annotations

import gc
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import Tensor, nn

from foveate.bench.fresh_process.run import peak_memory, reset_peak_memory
from foveate.bench.shared.extras import require
from foveate.calibrate.need import rows_needed
from foveate.calibrate.passes.options import CalibrationOptions
from foveate.calibrate.quantize import quantize_with
from foveate.calibrate.smallest_map import widths_of
from foveate.kernels.backends.table import ensure_loaded
from foveate.progress import Bar

#: Windows whose forward passes are timed, before and after.
_TIMED = 3


def measure(sizes: dict[str, Any]) -> dict[str, Any]:
    """Time forward passes, quantize the model, and time the forward passes again."""
    ensure_loaded()
    logging.getLogger("foveate").setLevel(logging.WARNING)
    package = require("transformers")
    package.LlamaForCausalLM  # noqa: B018  imports what building a model imports
    gc.collect()
    base = psutil.Process().memory_info().rss
    model = _model(package, sizes)
    widths = [width for width, embedding in widths_of(model) if not embedding]
    needed, length = rows_needed(widths), sizes["length"]
    config: Any = model.config
    most = getattr(config, "max_position_embeddings", length)
    length = min(length, most)
    count = sizes["windows"] or -(-needed // length)
    windows = list(_tokens(package, sizes, count * length, config.vocab_size).view(count, 1, length))
    weights = sum(p.numel() for p in model.parameters())
    model_bytes = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    rounds = [_forward(model, windows[:_TIMED])]
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
    rounds.append(_forward(_model(package, sizes), windows[:_TIMED]))
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


def _model(package: Any, sizes: dict[str, Any]) -> nn.Module:
    if sizes["model"] is None:
        torch.manual_seed(0)
        return cast(nn.Module, package.LlamaForCausalLM(package.LlamaConfig(**dict(sizes["shape"]))).eval())
    config = package.AutoConfig.from_pretrained(sizes["model"])
    kind = getattr(package, (config.architectures or ["AutoModel"])[0])
    return cast(nn.Module, kind.from_pretrained(sizes["model"], dtype=torch.float32).eval())


def _tokens(package: Any, sizes: dict[str, Any], count: int, words: int) -> Tensor:
    """Evenly spread over a text, repeated where it is short; or random ones."""
    if sizes["data"] is None:
        return torch.randint(0, words, (count,), generator=torch.Generator().manual_seed(0))
    tokenizer = package.AutoTokenizer.from_pretrained(sizes["model"])
    text = Path(sizes["data"]).read_text(encoding="utf-8")
    found = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    found = found.repeat(-(-count // len(found)))
    spread = found[: len(found) // sizes["length"] * sizes["length"]].view(-1, sizes["length"])
    wanted = -(-count // sizes["length"])
    chosen = torch.arange(wanted) * len(spread) // wanted
    return spread[chosen].flatten()[:count]


def _forward(model: nn.Module, windows: list[Tensor]) -> tuple[float, float]:
    """Seconds, and processor seconds, of a token in forward passes; the first one is not counted."""
    with torch.no_grad():
        model(windows[0])
        began, began_cpu = time.perf_counter(), time.process_time()
        for window in windows:
            model(window)
    tokens = sum(window.numel() for window in windows)
    return (time.perf_counter() - began) / tokens, (time.process_time() - began_cpu) / tokens


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
