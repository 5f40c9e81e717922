"""A whole transformer quantized by GPTQModel or auto-round as their users do it, and what that takes.

It runs with the Python that has the library. A request names the folder of a float32 model, and a numpy file of token
ids, int64 [n, T]. All further keys are the library's own settings; what is not named has the library's default.

    {"do": "quantize", "form": "gptqmodel", "model": FOLDER, "tokens": FILE, "threads": 2, "bits": 4, "group_size": 128}
    ->  {"seconds", "seconds_cpu", "peak", "version": of the library, "dtype": that it computes in}

Seconds and memory are without imports, and seconds without loading the model; nothing is written to the disk.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np
import torch
import transformers
from answers import serve
from meter import Meter


def gptqmodel(folder: str, ids_nT: torch.Tensor, **settings: Any) -> tuple[Meter, str]:
    """Load, quantize and pack; `settings` are those of `QuantizeConfig`."""
    # its own number is half of the processors, and on two of them it does not start: its loader asks for two workers
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, torch.get_num_threads())))
    from gptqmodel import GPTQModel, QuantizeConfig

    meter = Meter()
    batches = _batches(ids_nT)
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as disk:  # on which it keeps finished layers, and its log
        os.chdir(disk)
        model = GPTQModel.load(folder, QuantizeConfig(device="cpu", offload_to_disk_path=disk, **settings))
        with meter.work():
            model.quantize(batches, batch_size=1)
        os.chdir(here)
    return meter, str(model.model.dtype)


def auto_round(folder: str, ids_nT: torch.Tensor, **settings: Any) -> tuple[Meter, str]:
    """Load and quantize; `settings` are those of `AutoRound`."""
    from auto_round import AutoRound

    meter = Meter()
    batches = _batches(ids_nT)
    worker = AutoRound(
        folder, dataset=batches, nsamples=len(ids_nT), seqlen=ids_nT.shape[1], device_map="cpu", **settings
    )
    with tempfile.TemporaryDirectory() as compiled:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled  # it compiles, and nothing of an earlier run may help
        with meter.work():
            made, _ = worker.quantize()
    return meter, str(made.dtype)


def _batches(ids_nT: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T)} for ids_1T in ids_nT.split(1)]


#: By form: the function that quantizes, and the package whose version is reported.
FORMS: dict[str, tuple[Callable[..., tuple[Meter, str]], str]] = {
    "gptqmodel": (gptqmodel, "gptqmodel"),
    "auto-round": (auto_round, "auto-round"),
}


def quantize(form: str, model: str, tokens: str, threads: int, **settings: Any) -> dict[str, Any]:
    """Quantize a model and forget it."""
    torch.set_num_threads(threads)
    transformers.LlamaForCausalLM  # noqa: B018  imports what building a model imports
    function, package = FORMS[form]
    meter, dtype = function(model, torch.from_numpy(np.load(tokens, allow_pickle=False)), **settings)
    return {**meter.answer(), "version": metadata.version(package), "dtype": dtype}


if __name__ == "__main__":
    serve({"quantize": quantize})
