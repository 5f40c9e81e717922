"""Pages on what moved: importance that follows a stream, and one input whose rows chose their precision.

Path("following.html").write_text(following_page(tracker.history, tracker.verdict), encoding="utf-8")
Path("input.html").write_text(input_page(fv.explain(model, batch), words), encoding="utf-8")
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import torch

from foveate.errors import DataError
from foveate.importance.verdict import Decision, Snapshot, Verdict
from foveate.inputs.explain import Explanation
from foveate.report.document import card, cards, document, listed, section
from foveate.report.heat import Ticks, heat_chart
from foveate.report.palette import heat_colour
from foveate.sizes import format_bytes

#: Ticks above a heat map over time.
_TICKS = 8
#: Columns of a heat map over an input: further rows are left out, and the page says so.
_MOST_ROWS = 400
#: The darkest shade behind text.
_INK_SHOWS = 0.6


def following_page(history: Sequence[Snapshot], verdict: Verdict, title: str = "Rolling importance") -> str:
    """What `fv.track_importance` saw and did, as one self-contained HTML page.

    Args:
        history: `tracker.history`.
        verdict: `tracker.verdict`.
        title: of the page.

    Raises:
        DataError: there is no moment yet: one is kept at each decision (`TrackingOptions.decide_every`).
    """
    if not history:
        raise DataError("there is no moment yet: one is kept at each decision, after some thousand tokens")
    names = list(history[0].bits)
    moved = [one for one in verdict.decisions if one.accepted]
    ticks = _moments(history, moved)
    said = f"{verdict.tokens:,} tokens, {len(history)} moments, {len(names)} weights"
    size, _, unit = format_bytes(verdict.bytes).partition(" ")
    figures = cards(
        (
            card(f"{verdict.moves}", "moves", f"{len(verdict.decisions) - verdict.moves} proposals were refused"),
            card(f"{verdict.tiles:,}", "tiles", "moved in all"),
            card(size, unit, "of planes that are read from then on, or no longer"),
            card(f"{verdict.shadow_tokens:,}", "tokens", "were run again in shadow runs"),
        )
    )
    bits = {_shown(name): [one.bits[name] for one in history] for name in names}
    importance = {
        _shown(name): [
            math.log10(max(one.importance[name], 1e-3)) if name in one.importance else math.nan for one in history
        ]
        for name in names
    }
    lines = [str(one) for one in verdict.decisions] or ["No move was proposed: static is fine."]
    return document(
        title,
        "foveate, rolling importance",
        said,
        figures
        + section(
            "Bits over time",
            "The mean level of each weight's tiles. A line is a move; its sentence is in the list below.",
            heat_chart(bits, ticks, "bits"),
        )
        + section(
            "Importance over time",
            "Of each weight now, over what it was in calibration: 0 is the same, 1 ten times as much.",
            heat_chart(importance, ticks, "log10 of importance over calibration's"),
        )
        + section(
            "Decisions", "In the order in which they were taken.", listed([*lines, str(verdict).split("\n")[-1]])
        ),
    )


def _shown(site: str) -> str:
    return site.removesuffix(":weight")


def _moments(history: Sequence[Snapshot], moved: Sequence[Decision]) -> Ticks:
    step = max(1, len(history) // _TICKS)
    texts = {at: f"{history[at].token:,}" for at in range(0, len(history), step)}
    marks: dict[int, str] = {}
    for one in moved:
        at = next((i for i, moment in enumerate(history) if moment.token >= one.token), len(history))
        marks[at] = f"{marks[at]}; {one}" if at in marks else str(one)
    return Ticks(texts=texts, marks=marks)


def input_page(explanation: Explanation, words: Sequence[str] | None = None, title: str = "One input") -> str:
    """What one input made of the model, as one self-contained HTML page: which rows and which weights read more bits.

    Args:
        explanation: of `fv.explain`.
        words: the text of each row that has bits (`Explanation.token_bits`), such as tokens; numbers if not given.
        title: of the page.

    Raises:
        DataError: there are not as many words as rows.
    """
    row_bits = explanation.token_bits.tolist()
    rows = len(row_bits)
    words = [str(n) for n in range(rows)] if words is None else list(words)
    if len(words) != rows:
        raise DataError(f"{len(words)} words are given for {rows} rows of the input")
    low, high = explanation.low.bits, explanation.high.bits
    mean = sum(row_bits) / max(rows, 1)
    shown = min(rows, _MOST_ROWS)
    table = {
        _shown(layer.site): layer.bits[:shown].tolist() for layer in explanation.layers if len(layer.reads_high) == rows
    }
    step = max(1, shown // _TICKS)
    ticks = Ticks(texts={at: str(at) for at in range(0, shown, step)}, marks={})
    left_out = f" The first {shown} of {rows} rows are shown." if shown < rows else ""
    shares = [(layer.site, float(layer.reads_high.float().mean())) for layer in explanation.layers]
    figures = cards(
        (
            card(f"{mean:.3f}", "bits", f"a weight and row on average, between {low:.3f} and {high:.3f}"),
            card(f"{rows:,}", "rows", "tokens, or patches of images"),
            card(
                f"{sum(share for _, share in shares) / max(len(shares), 1):.0%}", "", "of choices took the higher map"
            ),
        )
    )
    return document(
        title,
        "foveate, inputs that choose",
        f"{len(explanation.layers)} products, {rows} rows",
        figures
        + section("Which got more", f"The darker, the more bits.{left_out}", _text(words[:shown], row_bits[:shown]))
        + section(
            "Weights and rows",
            f"The mean level at which each row read each weight.{left_out}",
            heat_chart(table, ticks, "mean level"),
        )
        + section(
            "Weights", "How the estimate and the true error compare, on average over rows.", _layers(explanation)
        ),
    )


def _text(words: Sequence[str], bits: Sequence[float]) -> str:
    """The words, each on the shade of its bits between the least and the greatest of them; light enough to be read."""
    low, high = min(bits, default=0.0), max(bits, default=0.0)
    parts = (
        f'<span style="background:{heat_colour(_INK_SHOWS * (value - low) / max(high - low, 1e-9))}" '
        f'title="{value:.3f} bits">{escape(word)}</span>'
        for word, value in zip(words, bits, strict=True)
    )
    return f'<p class="words">{" ".join(parts)}</p>'


def _layers(explanation: Explanation) -> str:
    heads = ("weight", "low", "high", "read high", "estimated", "true", "threshold")
    rows = []
    for layer in explanation.layers:
        share = float(layer.reads_high.float().mean()) if len(layer.reads_high) else 0.0
        errors = (float(torch.nan_to_num(e.mean())) for e in (layer.estimated, layer.true))
        cells = (
            _shown(layer.site),
            *(f"{level:.2f}" for level in layer.levels),
            f"{share:.0%}",
            *(f"{error:.2g}" for error in errors),
            f"{layer.threshold:.2g}",
        )
        rows.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table class="figures">{body}</table></div>'
