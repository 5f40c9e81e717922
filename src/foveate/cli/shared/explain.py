"""`foveate inspect --input`: where the bits of one text are, for each weight and for each token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import foveate as fv
from foveate.cli.shared.console import check_writable, emit, show
from foveate.cli.shared.data import positions_of, price_batches
from foveate.cli.shared.models import config_of, load_planes, load_tokenizer
from foveate.errors import DataError
from foveate.inputs import Explanation, InputAdaptation
from foveate.report import input_page


def show_explanation(
    out: Path, text: str, data: Path | None, bits: float, page: Path | None, json_output: bool
) -> None:
    """Let inputs choose at an average of bits, run one text, and print what it read.

    Args:
        out: a folder that `foveate quantize` wrote, with every plane.
        text: the input.
        data: a text file on which the price of a byte is found.
        bits: average bits of a weight.
        page: an HTML file to write, too.
        json_output: print one JSON object.

    Raises:
        DataError: there are no data, or the text has no tokens.
    """
    if data is None:
        raise DataError("there are no data to find the price of a byte on: give --data FILE.txt")
    if page is not None:
        check_writable(page)
    model, tokenizer = load_planes(out), load_tokenizer(str(out), "--input is a text, which needs one")
    most = positions_of(config_of(str(out)))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise DataError(f"the text (={text!r}) has no tokens")
    if most is not None and len(ids) > most:
        raise DataError(f"the text has {len(ids)} tokens, and the model {most} positions: give a shorter one")
    words = [tokenizer.decode([one]) for one in ids]
    with fv.adapt_to_input(model, bits=bits, batches=price_batches(data, out)) as adapted:
        explained = fv.explain(model, {"input_ids": torch.tensor([ids])})
        if page is not None:
            page.write_text(input_page(explained, words, text if len(text) < 60 else f"{text[:59]}…"), encoding="utf-8")
        if json_output:
            print(emit(_figures(adapted, explained, words)))
        else:
            show(
                str(adapted),
                "weights: the levels of the two maps, and how many tokens read the higher one",
                _layers(explained),
                "tokens: the mean bits of a weight that each read",
                _tokens(explained, words),
            )


def _figures(adapted: InputAdaptation, explained: Explanation, words: list[str]) -> dict[str, Any]:
    verdict = adapted.verdict
    assert verdict is not None
    return {
        "bits": adapted.correction.target,
        "verdict": {"ratio": verdict.ratio, "interval": list(verdict.interval), "pays": verdict.pays},
        "tokens": [
            {"text": word, "bits": bits} for word, bits in zip(words, explained.token_bits.tolist(), strict=True)
        ],
        "layers": [
            {
                "site": layer.site,
                "levels": list(layer.levels),
                "threshold": layer.threshold,
                "reads_high": layer.reads_high.tolist(),
                "estimated": layer.estimated.tolist(),
                "true": layer.true.tolist(),
            }
            for layer in explained.layers
        ],
    }


def _layers(explained: Explanation) -> Table:
    table = Table()
    for name in ("weight", "low", "high", "read high", "estimated", "true", "threshold"):
        table.add_column(name, justify="left" if name == "weight" else "right")
    for layer in explained.layers:
        table.add_row(
            layer.site.removesuffix(":weight"),
            *(f"{level:.2f}" for level in layer.levels),
            f"{float(layer.reads_high.float().mean()):.0%}",
            *(f"{float(errors.mean()):.2g}" for errors in (layer.estimated, layer.true)),
            f"{layer.threshold:.2g}",
        )
    return table


def _tokens(explained: Explanation, words: list[str]) -> Table:
    """Bits of each token, with a bar between the bits of the two maps."""
    table = Table()
    table.add_column("token")
    table.add_column("bits", justify="right")
    table.add_column("")
    low, high = explained.low.bits, explained.high.bits
    for word, bits in zip(words, explained.token_bits.tolist(), strict=True):
        table.add_row(repr(word), f"{bits:.3f}", "#" * round(30 * (bits - low) / max(high - low, 1e-9)))
    return table
