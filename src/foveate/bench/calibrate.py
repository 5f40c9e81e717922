"""The time and memory that quantizing takes, by phase, over those of the model itself.

The unit of time is a forward pass in float32 over 57,344 tokens (112 windows of 512), the unit of memory the bytes of
the float32 model. In a fresh process the forward passes are timed, then the model is quantized, and then they are timed
again, so that a slow period of the machine affects both. All in windows of one length, one window a batch.

- `calibrate_over_forward`: the time of `foveate.quantize` over that of the forward passes; `_cpu` in processor time,
  which other work on the machine affects less.
- `passes_over_forward`, `statistics_over_forward`, `rounding_over_forward`, `comparing_over_forward`: parts of it. The
  statistics are part of the passes.
- `token_over_forward`: the time of a token in the first pass over that of a token in a forward pass.
- `peak_over_model`: the highest resident size of the process while quantizing, less what it had after its imports.
- `estimate_over_time`: what the estimate said after the first batch, over the time of the phases it speaks of.

Without a model one of random weights is measured, with the shape of SmolLM2-135M. With fewer windows than calibration
needs, passes take less and the figures are of a sample.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foveate.bench.fresh_process.run import run_in_fresh_process
from foveate.bench.shared.result import BackgroundLoad, Measured
from foveate.errors import DataError
from foveate.kernels.backends.table import ensure_loaded
from foveate.sizes import format_bytes

#: The tokens whose forward passes are the unit of time.
TOKENS = 57344


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What is measured.

    Attributes:
        model: a transformers model, a local folder; random weights if not given.
        data: a text file that is tokenized with the model's tokenizer; random tokens if not given.
        windows: how many windows to calibrate on; as many as calibration needs if not given.
        length: tokens in a window.
        shape: arguments of `transformers.LlamaConfig` for the model of random weights.

    Raises:
        DataError: there are no windows, or windows without tokens.
    """

    model: str | None = None
    data: str | None = None
    windows: int | None = None
    length: int = 512
    shape: tuple[tuple[str, int | bool], ...] = (
        ("hidden_size", 576),
        ("intermediate_size", 1536),
        ("num_hidden_layers", 30),
        ("num_attention_heads", 9),
        ("num_key_value_heads", 3),
        ("vocab_size", 49152),
        ("tie_word_embeddings", True),
    )

    def __post_init__(self) -> None:
        if self.windows is not None and self.windows < 1:
            raise DataError(f"windows (={self.windows}) is not at least 1")
        if self.length < 2:
            raise DataError(f"length (={self.length}) is not at least 2")
        if self.data is not None and not Path(self.data).is_file():
            raise DataError(f"data (={self.data}) is not a file")


def measure(sizes: Calibrated | None = None) -> Measured:
    """Quantize one model in a fresh process, between two forward passes over the same windows."""
    sizes = sizes or Calibrated()
    ensure_loaded()
    with BackgroundLoad() as background:
        found = run_in_fresh_process("foveate.bench.fresh_process.calibrate", json.dumps(asdict(sizes)))
    return Measured(_figures(found), (found,), (*_notes(found), background.note()))


def _figures(found: dict[str, Any]) -> dict[str, float]:
    forward, forward_cpu = found["forward_token"] * TOKENS, found["forward_token_cpu"] * TOKENS
    spent = found["seconds"]
    passes = sum(v for phase, v in spent.items() if phase.endswith("pass") or phase.startswith("pass"))
    figures = {
        "calibrate_over_forward": found["calibrate"] / forward,
        "calibrate_over_forward_cpu": found["calibrate_cpu"] / forward_cpu,
        "passes_over_forward": passes / forward,
        "statistics_over_forward": found["statistics"] / forward,
        "rounding_over_forward": spent["rounding"] / forward,
        "comparing_over_forward": spent.get("comparing", 0.0) / forward,
        "token_over_forward": spent["first pass"] / found["tokens"] / found["forward_token"],
        "peak_over_model": found["peak"] / found["model_bytes"],
        "tokens": found["tokens"],
    }
    if found["estimate"]:
        figures["estimate_over_time"] = found["estimate"] / (passes + spent["rounding"] + spent.get("comparing", 0.0))
    return figures


def _notes(found: dict[str, Any]) -> list[str]:
    phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in found["seconds"].items())
    notes = [
        f"{found['weights'] / 1e6:.1f} M weights, {format_bytes(found['model_bytes'])} in float32, {found['batches']} "
        f"windows of {found['length']} tokens",
        f"seconds: {phases}; all of them {found['calibrate']:.1f}",
        f"a token takes {1e3 * found['forward_token']:.2f} ms in a forward pass, before and after "
        f"{', '.join(f'{1e3 * s:.2f}' for s in found['forward_rounds'])}",
    ]
    if found["tokens"] < found["needed"]:
        notes.append(f"a sample: calibration needs {found['needed']} tokens")
    return notes
