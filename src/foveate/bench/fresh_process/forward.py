"""The unit of quantizing's time: what a token takes in float32 forward passes of the model.

python -m foveate.bench.fresh_process.forward SIZES, a JSON object (`foveate.bench.calibrate.Calibrated`)
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from foveate.bench.shared.extras import require

#: Windows whose forward passes are timed.
TIMED = 3


def float_model(sizes: dict[str, Any]) -> nn.Module:
    """The named model in float32, or one of random weights."""
    package = require("transformers")
    if sizes["model"] is None:
        torch.manual_seed(0)
        return cast(nn.Module, package.LlamaForCausalLM(package.LlamaConfig(**dict(sizes["shape"]))).eval())
    config = package.AutoConfig.from_pretrained(sizes["model"])
    kind = getattr(package, (config.architectures or ["AutoModel"])[0])
    return cast(nn.Module, kind.from_pretrained(sizes["model"], dtype=torch.float32).eval())


def spread_tokens(sizes: dict[str, Any], count: int, words: int) -> Tensor:
    """`count` tokens, windows evenly spread over a text, repeated where it is short; or random ones."""
    if sizes["data"] is None:
        return torch.randint(0, words, (count,), generator=torch.Generator().manual_seed(0))
    tokenizer = require("transformers").AutoTokenizer.from_pretrained(sizes["model"])
    text = Path(sizes["data"]).read_text(encoding="utf-8")
    found = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    found = found.repeat(-(-count // len(found)))
    spread = found[: len(found) // sizes["length"] * sizes["length"]].view(-1, sizes["length"])
    wanted = -(-count // sizes["length"])
    chosen = torch.arange(wanted) * len(spread) // wanted
    return spread[chosen].flatten()[:count]


def token_seconds(model: nn.Module, windows: list[Tensor]) -> tuple[float, float]:
    """Seconds, and processor seconds, of a token in forward passes; the first one is not counted."""
    with torch.no_grad():
        model(windows[0])
        began, began_cpu = time.perf_counter(), time.process_time()
        for window in windows:
            model(window)
    tokens = sum(window.numel() for window in windows)
    return (time.perf_counter() - began) / tokens, (time.process_time() - began_cpu) / tokens


def measure(sizes: dict[str, Any]) -> dict[str, float]:
    """Seconds and processor seconds of a token."""
    model = float_model(sizes)
    config: Any = model.config
    length = min(sizes["length"], getattr(config, "max_position_embeddings", sizes["length"]))
    windows = list(spread_tokens(sizes, TIMED * length, config.vocab_size).view(TIMED, 1, length))
    seconds, seconds_cpu = token_seconds(model, windows)
    return {"token": seconds, "token_cpu": seconds_cpu}


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
