"""Streams of texts A -> B -> A through a model that follows its task, beside static maps of equal bytes.

Three maps read every batch, and each is compared with the float model: the *online* map, as the tracker left it after
the batches before; the *static mixed* map, allocated from calibration on all texts; and the *oracle*, allocated from
the importance of the very text, measured beforehand on other parts of it. All take the same bytes and read the same
planes. Gradients' energies are those of the one calibration, for the oracle too.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.allocate.plan import allocate
from foveate.bench.importance.mixture import Text, windows
from foveate.calibrate.quantize import quantize
from foveate.importance.moves import Caution
from foveate.importance.observe import Observer
from foveate.importance.options import Shadow, TrackingOptions
from foveate.importance.rolling import Decay, baseline, ratios, rescaled, start, update
from foveate.importance.track import track_importance
from foveate.importance.verdict import Decision
from foveate.nn.levels import apply, withdraw
from foveate.nn.registry import quantized_part, registry_of
from foveate.precision.budgets import Budget
from foveate.precision.maps import PrecisionMap
from foveate.precision.profiles import Profile
from foveate.progress import track

_DECIDER = "bench"
#: The texts that a stream leads through; the third part is the first text again.
ORDERS: tuple[tuple[str, str], ...] = (
    ("stories", "c"),
    ("c", "encyclopedia"),
    ("encyclopedia", "shakespeare"),
    ("shakespeare", "stories"),
    ("c", "shakespeare"),
    ("encyclopedia", "stories"),
)


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How much is run: batches of each part of a stream, windows of a batch, bytes of a window, and batches of
    calibration and of an oracle.
    """

    batches: int = 20
    windows: int = 4
    window: int = 96
    calibration: int = 16
    oracle: int = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A quantized model, its float original, and its profile."""

    model: nn.Module
    original: nn.Module
    profile: Profile


def subject(model: nn.Module, texts: Mapping[str, Text], lengths: Lengths) -> Subject:
    """Quantize a copy of a model on all texts in equal parts."""
    generator = torch.Generator().manual_seed(1)
    batches = [
        {"input_ids": torch.cat([windows(text.train, 2, lengths.window, generator) for text in texts.values()])}
        for _ in range(lengths.calibration)
    ]
    on_planes = copy.deepcopy(model)
    profile = quantize(on_planes, batches, progress=False)
    return Subject(model=on_planes, original=model, profile=profile)


def options(lengths: Lengths) -> TrackingOptions:
    """How the streams are followed: every pass is observed, for the parts are short."""
    tokens = lengths.windows * lengths.window
    return TrackingOptions(
        decay=Decay(keep=0.5, tokens=8 * tokens),
        warm_up=2 * tokens,
        observe_every=1,
        most_time=None,
        decide_every=2 * tokens,
        caution=Caution(margin=0.02),
        shadow=Shadow(calls=8, tokens=lengths.window, every=1 << 18),
    )


def oracles(one: Subject, texts: Mapping[str, Text], budget: Budget, lengths: Lengths) -> dict[str, PrecisionMap]:
    """The map of each text's own importance, under a budget."""
    module, registry = quantized_part(one.model), registry_of(one.model)
    means = baseline(one.profile)
    found = {}
    for name, text in texts.items():
        generator = torch.Generator().manual_seed(2)
        state = start(means)
        observer = Observer(module, registry, frozenset(means))
        for _ in range(lengths.oracle):
            ids = windows(text.train, lengths.windows, lengths.window, generator)
            observer.begin()
            with torch.no_grad():
                one.model(input_ids=ids, use_cache=False)
            state = update(state, observer.end(), Decay(keep=1 - 1e-9, tokens=1 << 30), ids.numel())
        by = ratios(one.profile, state.means())
        found[name] = allocate(rescaled(one.profile, by), budget)
    return found


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a stream: its text, the mean KL of each map, and the decisions that were taken in it."""

    text: str
    online: float
    static: float
    oracle: float
    first_move: int | None
    moved_bytes: int
    moved_tiles: int


def run_stream(
    one: Subject, texts: Mapping[str, Text], order: Sequence[str], maps: Mapping[str, PrecisionMap], lengths: Lengths
) -> list[Part]:
    """Follow one stream of texts.

    Args:
        one: the model.
        texts: where its bytes come from.
        order: the text of each part.
        maps: `static`, and the oracle of each text.
        lengths: how much is run.
    """
    parts = []
    budget = Budget(bits=maps["static"].bits)
    generator = torch.Generator().manual_seed(3)
    decisions: list[Decision] = []
    with track_importance(one.model, budget, options=options(lengths), on_decision=decisions.append) as tracker:
        for name in order:
            sums, began, before = {"online": 0.0, "static": 0.0, "oracle": 0.0}, tracker.verdict.tokens, len(decisions)
            for _ in range(lengths.batches):
                ids = windows(texts[name].held_out, lengths.windows, lengths.window, generator)
                wanted = _logits(one.original, ids)
                sums["online"] += _kl(wanted, _logits(one.model, ids))
                for label, plan in (("static", maps["static"]), ("oracle", maps[name])):
                    apply(one.model, plan, decider=_DECIDER)
                    sums[label] += _kl(wanted, _logits(one.model, ids))
                    withdraw(one.model, _DECIDER)
            moves = [decision for decision in decisions[before:] if decision.accepted]
            parts.append(
                Part(
                    text=name,
                    **{label: value / lengths.batches for label, value in sums.items()},
                    first_move=moves[0].token - began if moves else None,
                    moved_bytes=sum(move.bytes for move in moves),
                    moved_tiles=sum(move.tiles for move in moves),
                )
            )
    return parts


def steady_moves(one: Subject, texts: Mapping[str, Text], budget: Budget, lengths: Lengths) -> tuple[int, int]:
    """(moves in the second half of a stream of all texts at once, tokens of that half)."""
    generator = torch.Generator().manual_seed(4)
    count = 3 * lengths.batches
    with track_importance(one.model, budget, options=options(lengths)) as tracker:
        middle = 0
        for number in range(count):
            if number == count // 2:
                middle, tokens = tracker.verdict.moves, tracker.verdict.tokens
            ids = torch.cat([windows(text.held_out, 1, lengths.window, generator) for text in texts.values()])
            _logits(one.model, ids)
        return tracker.verdict.moves - middle, tracker.verdict.tokens - tokens


def measure_streams(
    one: Subject, texts: Mapping[str, Text], bits: float, orders: Sequence[tuple[str, str]], lengths: Lengths
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(figures, one row a part) of streams A -> B -> A at so many average bits."""
    budget = Budget(bits=bits)
    static = allocate(one.profile, budget)
    maps = {"static": static, **oracles(one, texts, budget, lengths)}
    rows: list[dict[str, Any]] = []
    for first, second in track(orders, "streams"):
        parts = run_stream(one, texts, (first, second, first), maps, lengths)
        rows += [{"order": f"{first} {second} {first}", "part": i, **vars(p)} for i, p in enumerate(parts)]
    low, high = _interval(rows)
    shifts = [row for row in rows if row["part"] > 0]
    recovered = [row["first_move"] for row in shifts if row["first_move"] is not None]
    figures = {
        "online_over_static_mixed_kl": _over(rows, "online"),
        "online_over_static_mixed_kl_low": low,
        "online_over_static_mixed_kl_high": high,
        "oracle_over_static_mixed_kl": _over(rows, "oracle"),
        "static_mixed_kl": sum(row["static"] for row in rows) / len(rows),
        "shifts_followed": len(recovered) / max(len(shifts), 1),
        "tokens_to_first_move": sorted(recovered)[len(recovered) // 2] if recovered else float("nan"),
        "bytes_moved_a_shift": sum(row["moved_bytes"] for row in shifts) / max(len(shifts), 1),
    }
    return figures, rows


def _over(rows: Sequence[Mapping[str, Any]], label: str) -> float:
    """The KL of a map over that of the static one, each part with the same weight: a geometric mean of ratios."""
    logs = [torch.tensor(row[label] / row["static"]).log() for row in rows]
    return float(torch.stack(logs).mean().exp())


def _interval(rows: Sequence[Mapping[str, Any]], resamples: int = 2000) -> tuple[float, float]:
    """The central 95 % of the online ratio over resampled streams."""
    chooser = random.Random(0)
    orders = sorted({row["order"] for row in rows})
    logs = {
        order: [float(torch.tensor(r["online"] / r["static"]).log()) for r in rows if r["order"] == order]
        for order in orders
    }
    values = []
    for _ in range(resamples):
        chosen = [value for _ in orders for value in logs[chooser.choice(orders)]]
        values.append(sum(chosen) / len(chosen))
    values.sort()
    ends = (values[int(0.025 * resamples)], values[int(0.975 * resamples) - 1])
    return float(torch.tensor(ends[0]).exp()), float(torch.tensor(ends[1]).exp())


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


def _kl(wanted: Tensor, got: Tensor) -> float:
    reference = wanted.log_softmax(-1)
    divergence = F.kl_div(got.log_softmax(-1), reference, log_target=True, reduction="none").sum(-1)
    return float(divergence.double().mean())


def mean_kl(one: Subject, plans: Sequence[PrecisionMap], batches: Sequence[Tensor]) -> list[float]:
    """The mean KL of each map over the same batches."""
    sums = [0.0] * len(plans)
    for ids in batches:
        wanted = _logits(one.original, ids)
        for number, plan in enumerate(plans):
            apply(one.model, plan, decider=_DECIDER)
            sums[number] += _kl(wanted, _logits(one.model, ids)) / len(batches)
    withdraw(one.model, _DECIDER)
    return sums
