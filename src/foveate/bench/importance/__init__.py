"""Rolling importance on streams of texts: a mixture of experts and a dense model, sparsity, and what following costs.

It trains two small models on four texts (a few minutes of one core; kept for the next time), and needs the folder that
`FOVEATE_DATA` names. Figures of the dense model begin with `dense_`; it is the null, from which no gain is expected.
"""

from __future__ import annotations

from pathlib import Path

import torch

from foveate.bench.importance.mixture import DENSE, MIXTURE, Recipe, default_cache, texts, trained
from foveate.bench.importance.overhead import measure_overhead
from foveate.bench.importance.sparsity import measure_half_zero, measure_zeros
from foveate.bench.importance.stream import ORDERS, Lengths, measure_streams, steady_moves, subject
from foveate.bench.shared.result import BackgroundLoad, Measured
from foveate.precision.budgets import Budget

BITS = 3.0
ZERO_BITS = 2.5


def measure(
    lengths: Lengths | None = None,
    recipes: tuple[Recipe, Recipe] = (MIXTURE, DENSE),
    cache: Path | None = None,
    folder: Path | None = None,
) -> Measured:
    """Train or read the models, quantize them on all texts, and stream the texts through them.

    Args:
        lengths: how much is run.
        recipes: of the mixture, and of the dense model.
        cache: the folder that keeps trained models.
        folder: the folder of the texts.
    """
    lengths = lengths or Lengths()
    sources = texts(folder)
    figures: dict[str, float] = {}
    rounds = []
    with BackgroundLoad() as load:
        for prefix, recipe in zip(("", "dense_"), recipes, strict=True):
            one = subject(trained(recipe, sources, cache or default_cache()), sources, lengths)
            found, rows = measure_streams(one, sources, BITS, ORDERS, lengths)
            rounds += [{"model": "dense" if prefix else "mixture", **row} for row in rows]
            found |= measure_zeros(one, sources, ZERO_BITS, lengths)
            moves, tokens = steady_moves(one, sources, Budget(bits=BITS), lengths)
            found |= {"moves_at_rest": moves, "tokens_at_rest": tokens}
            if not prefix:
                prompt = sources["stories"].held_out[: lengths.window].long()[None]
                found |= measure_overhead(one, prompt, BITS)
            figures |= {prefix + name: value for name, value in found.items()}
        figures |= measure_half_zero()
    notes = (
        f"{len(ORDERS)} streams A B A at {BITS} average bits; each part has {lengths.batches} batches of "
        f"{lengths.windows} windows of {lengths.window} bytes; maps take equal bytes",
        "the interval is of streams that are drawn again with replacement, 95 %",
        f"torch had {torch.get_num_threads()} threads; {load.note()}",
    )
    return Measured(figures, rounds, notes)
