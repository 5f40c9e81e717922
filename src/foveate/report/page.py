"""The report: one HTML file that shows where a model's bits are and what they cost.

The page has no script and fetches nothing. It is light or dark by the reader's setting.

    page = html(plan, title="my model", profile=profile, frontier=fv.frontier(profile))
    Path("report.html").write_text(page, encoding="utf-8")
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from foveate.errors import SiteError
from foveate.evaluate.float32_floor import FLOAT32_FLOOR, both_at_floor
from foveate.evaluate.verify import Outcome
from foveate.formats.levels import NESTED_LEVELS
from foveate.precision.maps import PrecisionMap, uniform_of_bytes
from foveate.precision.profiles import Profile
from foveate.report.document import card, cards, document, listed
from foveate.report.layers import dense_bytes, layers_of
from foveate.report.picture import HEAT_LEVEL, picture
from foveate.report.plot import Mark, plot
from foveate.sizes import format_bytes


@dataclass(frozen=True)
class Measured:
    """A map and its measured outcome.

    Attributes:
        label: the name of the map, such as `4 bits` or `default map`.
        plan: the map; None for the reference itself.
        outcome: the result of `foveate.measure`.
        is_default: whether the report is about this map.
    """

    label: str
    plan: PrecisionMap | None
    outcome: Outcome
    is_default: bool = False


def loss_name(objective: str | None) -> str:
    """The name of divergence and predicted loss in tables, for the name of an objective."""
    if objective is None:
        return "divergence from the original"
    return "1 - cosine to the original" if objective.endswith("embedding") else "KL to the original, nats"


def figure(value: float) -> str:
    """The number with three or more digits, or a dash where it is not finite."""
    if not math.isfinite(value):
        return "–"
    return "0" if value == 0 else f"{value:.4f}" if 0.1 <= abs(value) < 100 else f"{value:.3g}"


def divergence_text(outcome: Outcome) -> str:
    """The divergence and its standard error; a divergence below the floor of float32 is shown as such."""
    if outcome.divergence and both_at_floor(outcome.divergence):
        return f"< {FLOAT32_FLOOR:.1e}, the floor of float32"
    error = f" ± {figure(outcome.standard_error)}" if outcome.standard_error else ""
    return f"{figure(outcome.divergence)}{error}"


def html(
    plan: PrecisionMap,
    *,
    title: str = "Precision map",
    profile: Profile | None = None,
    frontier: Iterable[PrecisionMap] = (),
    measured: Sequence[Measured] = (),
    metric: str = "loss",
    notes: Sequence[str] = (),
) -> str:
    """The report as one self-contained HTML page.

    Args:
        plan: the map that the report is about.
        title: the title of the page, usually the model's name.
        profile: the model's profile; it adds the sensitivity, and the predicted loss of uniform precision.
        frontier: maps from the best to the cheapest, as `foveate.frontier` returns them.
        measured: maps that were run on held-out data.
        metric: the heading of `Outcome.metric`.
        notes: sentences that are added to the profile's notes.

    Raises:
        SiteError: the profile is of another model than the map.
    """
    if profile is not None and set(profile.sites) != set(plan.sites):
        raise SiteError("the profile and the map are of different models: their sites differ")
    name = loss_name(None if profile is None else profile.objective)
    sections = [
        _picture_section(plan, profile),
        _plot_section(plan, profile, tuple(frontier), measured, name),
        _outcome_section(measured, name, metric),
    ]
    said = [*notes, *(() if profile is None else profile.notes)]
    if said:
        sections.append(f"<section><h2>Notes</h2>{listed(said)}</section>")
    return document(
        title,
        "foveate report",
        _subtitle(plan, profile),
        f"{_cards(plan, profile, measured, name)}{''.join(sections)}",
        "A value is stored as bit planes, most significant first; its precision is how many planes are read. "
        "Made by foveate.",
    )


def _subtitle(plan: PrecisionMap, profile: Profile | None) -> str:
    sites = list(plan.weight_sites())
    said = f"{sum(s.weights for s in sites):,} weights in {len(sites)} matrices, {len(layers_of(sites))} layers"
    if profile is not None:
        said += f"; sensitivity measured on {profile.samples:,} samples"
    return said


def _split(size: float) -> tuple[str, str]:
    value, _, unit = format_bytes(size).partition(" ")
    return value, unit


def _cards(plan: PrecisionMap, profile: Profile | None, measured: Sequence[Measured], name: str) -> str:
    dense = dense_bytes(plan, 4)
    made = [
        card(f"{plan.bits:.2f}", "bits", "a weight on average, scales included"),
        card(
            *_split(plan.bytes_resident),
            f"in memory, {dense / max(plan.bytes_resident, 1):.1f} times smaller than float32 ({format_bytes(dense)})",
        ),
        card(*_split(plan.bytes_read), "read for each token or input"),
    ]
    loss = predicted_loss(plan, profile)
    if math.isfinite(loss):
        beside = (
            "" if profile is None else f"; uniform at equal bytes {figure(profile.predict(uniform_of_bytes(plan)))}"
        )
        made.append(card(figure(loss), "", f"predicted {name}{beside}"))
    for entry in measured:
        if entry.is_default:
            made.append(card(divergence_text(entry.outcome), "", f"measured {name}"))
            made.append(
                card(f"{entry.outcome.agreement:.1%}", "", f"of {entry.outcome.samples:,} decisions are the original's")
            )
    return cards(made)


def predicted_loss(plan: PrecisionMap, profile: Profile | None) -> float:
    """The predicted loss that the map carries, or else the profile's prediction; NaN without either."""
    if math.isfinite(plan.predicted_loss) or profile is None:
        return plan.predicted_loss
    return profile.predict(plan)


def _picture_section(plan: PrecisionMap, profile: Profile | None) -> str:
    heat = ""
    if profile is not None:
        heat = (
            " The squares at the end of a row are its weights in the same order: "
            f"the redder a square, the more its weight alone would lose at {HEAT_LEVEL} bits."
        )
    return (
        "<section><h2>Where the bits are</h2>"
        '<p class="soft">Each row is a layer and each bar a weight. The colours show the share of tiles at each '
        f"level: the darker, the more bits. The number after the bars is the mean level.{heat} "
        f"Point at a bar or a square to see its numbers.</p>{picture(plan, profile)}</section>"
    )


_KEYS = {
    "frontier": (
        '<line class="frontier" x1="1" x2="15" y1="7" y2="7"/>',
        "frontier: the least predicted loss at each size",
    ),
    "uniform": (
        '<g class="uniform"><rect x="3.5" y="2.5" width="9" height="9" rx="1.5"/></g>',
        "uniform precision, predicted",
    ),
    "chosen": ('<g class="chosen"><path d="M8 0l7 7l-7 7l-7 -7z"/></g>', "this map, predicted"),
    "measured": ('<g class="measured"><circle cx="8" cy="7" r="5"/></g>', "measured"),
}


def _tip(what: str, loss: float, plan: PrecisionMap) -> str:
    return f"{what} {figure(loss)}, {format_bytes(plan.bytes_resident)} in memory"


def _plot_section(
    plan: PrecisionMap,
    profile: Profile | None,
    frontier: Sequence[PrecisionMap],
    measured: Sequence[Measured],
    name: str,
) -> str:
    line = [(m.bits, predicted_loss(m, profile)) for m in frontier]
    marks: list[Mark] = []
    if profile is not None:
        for level in NESTED_LEVELS:
            even = profile.uniform(level)
            tip = _tip(f"uniform {level} bits: predicted", even.predicted_loss, even)
            marks.append(Mark(even.bits, even.predicted_loss, f"{level} bits", tip, "uniform"))
    loss = predicted_loss(plan, profile)
    marks.append(Mark(plan.bits, loss, "this map", _tip("this map: predicted", loss, plan), "chosen"))
    for entry in measured:
        if entry.plan is not None:
            tip = _tip(f"{entry.label}: measured", entry.outcome.divergence, entry.plan)
            label = "" if profile is not None else entry.label
            marks.append(
                Mark(entry.plan.bits, entry.outcome.divergence, label, tip, "measured", entry.outcome.standard_error)
            )
    drawn = plot(line, marks, name)
    if not drawn or len(line) + len(marks) < 2:
        return ""
    kinds = ["frontier"] * (len(line) > 1) + [
        k for k in ("uniform", "chosen", "measured") if any(m.kind == k for m in marks)
    ]
    keys = "".join(
        f'<span class="key"><svg class="mark plot" viewBox="0 0 16 14">{_KEYS[k][0]}</svg>{_KEYS[k][1]}</span>'
        for k in kinds
    )
    return (
        "<section><h2>Loss against size</h2>"
        '<p class="soft">Further left is smaller, lower is closer to the original; '
        "the axis is logarithmic. "
        "A good map lies on the line and below the squares.</p>"
        f'<div class="scroll">{drawn}</div><div class="legend">{keys}</div></section>'
    )


def _outcome_section(measured: Sequence[Measured], name: str, metric: str) -> str:
    if not measured:
        return ""
    with_metric = any(entry.outcome.metric is not None for entry in measured)
    heads = ["map", "bits", "stored", "in memory", "read", *([metric] if with_metric else []), name, "agreement"]
    rows = []
    for entry in measured:
        own, got = entry.plan, entry.outcome
        sizes = ["–", "–", "–", "–"]
        if own is not None:
            sizes = [
                f"{own.bits:.2f}",
                *(format_bytes(size) for size in (own.bytes_stored, own.bytes_resident, own.bytes_read)),
            ]
        quality = [divergence_text(got), f"{got.agreement:.2%}"] if own is not None else ["–", "–"]
        values = [
            entry.label,
            *sizes,
            *([figure(got.metric if got.metric is not None else math.nan)] if with_metric else []),
            *quality,
        ]
        style = ' class="chosen"' if entry.is_default else ""
        rows.append(f"<tr{style}>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    samples = max(entry.outcome.samples for entry in measured)
    return (
        "<section><h2>What was measured</h2>"
        f'<p class="soft">Each map was run on the same {samples:,} samples and compared with the reference. '
        "Agreement is the share of decisions that equal the reference's; ± is one standard error.</p>"
        f'<div class="scroll"><table class="figures"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )
