"""A whole transformer rounded by auto-round, block after block on its calibration data, and returned as matrices.

It runs with the Python that has the library. A request names the folder of a transformers model and a file of numpy
arrays: token ids and masks, int64 [B, S] each, `ids_0`, `mask_0`, `ids_1`, ...

    {"do": "round", "form": "auto-round", "bits": 4, "group": 128, "iterations": 200, "model": FOLDER, "kind": CLASS,
     "tokens": FILE, "names": [of the layers], "out": FILE}
    ->  {"bytes": of codes, scales and zero points, "version": of the library}
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import numpy as np
import torch
import transformers
from answers import serve
from auto_round import AutoRound
from round_matrices import packed


class _Tokenizer:
    """The tokenizer that auto-round requires. It uses only the padding token."""

    pad_token: str | None = None

    def __init__(self, pad_token_id: int | None) -> None:
        self.pad_token_id = pad_token_id


def _batches(file: str, size: int) -> list[dict[str, torch.Tensor]]:
    """The calibration data, cut to one length, because auto-round drops shorter samples."""
    with np.load(file, allow_pickle=False) as held:
        count = sum(name.startswith("ids_") for name in held.files)
        pairs = [(torch.from_numpy(held[f"ids_{i}"]), torch.from_numpy(held[f"mask_{i}"])) for i in range(count)]
    length = max(ids.shape[1] for ids, _ in pairs)
    ids_NS = torch.cat([torch.nn.functional.pad(ids, (0, length - ids.shape[1])) for ids, _ in pairs])
    mask_NS = torch.cat([torch.nn.functional.pad(mask, (0, length - mask.shape[1])) for _, mask in pairs])
    parts = zip(ids_NS.split(size), mask_NS.split(size), strict=True)
    return [{"input_ids": ids_BS, "attention_mask": mask_BS} for ids_BS, mask_BS in parts]


def round_model(
    form: str,
    bits: int,
    group: int,
    iterations: int,
    learning_rate: float | None,
    model: str,
    kind: str,
    tokens: str,
    names: list[str],
    out: str,
) -> dict[str, Any]:
    """Round the named layers and write what came out."""
    loaded = getattr(transformers, kind).from_pretrained(model, dtype=torch.float32)
    batches = _batches(tokens, 8)
    chosen = {} if learning_rate is None else {"lr": learning_rate}
    worker = AutoRound(
        loaded,
        tokenizer=_Tokenizer(getattr(loaded.config, "pad_token_id", None)),
        bits=bits,
        group_size=group,
        sym=False,
        iters=iterations,
        seqlen=batches[0]["input_ids"].shape[1],
        nsamples=sum(len(b["input_ids"]) for b in batches),
        batch_size=8,
        dataset=batches,
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
        **chosen,
    )
    rounded, _ = worker.quantize()
    layers = dict(rounded.named_modules())
    total = 0
    dense: dict[str, Any] = {}
    for name in names:
        layer = layers[name]
        if not isinstance(getattr(layer, "scale", None), torch.Tensor):
            raise RuntimeError(f"auto-round leaves {name} as it is: its shape is {tuple(layer.weight.shape)}")
        dense[name] = layer.weight.detach().float().numpy()
        groups = layer.scale.numel()
        total += packed(bits, layer.weight.numel()) + 2 * groups + packed(bits, groups)
    np.savez(out, **dense)
    return {"bytes": total, "version": metadata.version(form)}


if __name__ == "__main__":
    serve({"round": round_model})
