"""Text run through a Llama with transformers' own quantized cache, one token at a time.

It needs transformers, optimum-quanto and hqq. The prompt is read at once, all that follows token by token.

    {"do": "decode", "model": FOLDER, "tokens": FILE, "prompt": 128, "settings": {"backend": "quanto", ...},
     "out": FILE}  ->  {"version": of transformers and of the backend}

Tokens are int64 [n, T]. The output is float32 [n, T - prompt, V]: the logits of every token after the prompt.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata
from typing import Any

import numpy as np
import torch
from answers import serve
from transformers import AutoModelForCausalLM, QuantizedCache

#: Sequences per batch.
_BATCH = 64


@cache
def model_of(folder: str) -> Any:
    """The model, float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@torch.inference_mode()
def decode(model: str, tokens: str, prompt: int, settings: dict[str, Any], out: str) -> dict[str, Any]:
    """Answer a request."""
    net = model_of(model)
    with np.load(tokens, allow_pickle=False) as held:
        ids_nT = torch.from_numpy(held["tokens"])
    logits = []
    for ids_BT in ids_nT.split(_BATCH):
        past = QuantizedCache(config=net.config, **settings)
        # by its place (after the mask and the positions), since its name depends on the release
        net(ids_BT[:, :prompt], None, None, past)
        steps = [net(ids_B1, None, None, past).logits for ids_B1 in ids_BT[:, prompt:].split(1, dim=1)]
        logits.append(torch.cat(steps, 1))
    np.savez(out, logits=torch.cat(logits).numpy())
    package = {"quanto": "optimum-quanto"}.get(settings["backend"], settings["backend"])
    return {"version": f"{metadata.version('transformers')} with {package} {metadata.version(package)}"}


if __name__ == "__main__":
    serve({"decode": decode})
