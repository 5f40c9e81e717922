"""The figures of `quality_peers`, from its rows.

A ratio is our divergence over a peer's, at the peer's bytes. The best peer of a model at a point is the one with the
greatest ratio among all settings. `kl_over_stand_in` is the ratio to our own rounding for one level only, in models
with convolutions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import exp, log
from typing import Any

from benchmarks.peers.quality.settings import POINTS, STAND_IN

Row = Mapping[str, Any]
#: By figure, the two maps of a model whose divergences are divided.
OWN = {
    "nested_penalty_b4": ("uniform 4", "one level 4"),
    "nested_penalty_b3": ("uniform 3", "one level 3"),
    "kl_b6_over_b4": ("uniform 6", "uniform 4"),
    "kl_b8_over_b4": ("uniform 8", "uniform 4"),
}


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of some values."""
    logs = [log(max(value, 1e-12)) for value in values]
    return exp(sum(logs) / len(logs))


def best_peers(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """By model and point, the row of the peer with the greatest ratio."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        if "peer" in row:
            key = (row["model"], row["point"])
            if key not in best or row["ratio"] > best[key]["ratio"]:
                best[key] = row
    return best


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """All figures that can be computed from the rows."""
    result: dict[str, float] = {}
    best = best_peers(rows)
    for point in POINTS:
        ratios = {model: row["ratio"] for (model, p), row in best.items() if p == point}
        if ratios:
            result[f"kl_over_best_peer_{point}"] = geometric_mean(ratios.values())
            result |= {f"kl_over_best_peer_{point}_{model}": ratio for model, ratio in ratios.items()}
        stand_ins = [row["ratio"] for row in rows if row.get("peer") == STAND_IN and row["point"] == point]
        if stand_ins:
            result[f"kl_over_stand_in_{point}"] = geometric_mean(stand_ins)
    if best:
        result["kl_over_best_peer_worst"] = max(row["ratio"] for row in best.values())
    maps: dict[str, dict[str, Row]] = {}
    for row in rows:
        if "map" in row:
            maps.setdefault(row["model"], {})[row["map"]] = row
    for name, (above, below) in OWN.items():
        ratios = {
            model: held[above]["divergence"] / max(held[below]["divergence"], 1e-12)
            for model, held in maps.items()
            if above in held and below in held
        }
        if ratios:
            result[name] = geometric_mean(ratios.values())
            result |= {f"{name}_{model}": ratio for model, ratio in ratios.items()}
    for point in POINTS:
        ratios = {}
        for model, held in maps.items():
            plan = held.get(f"allocated {point}")
            if plan:
                result[f"predicted_kl_{point}_{model}"] = plan["predicted"]
                result[f"measured_kl_{point}_{model}"] = plan["divergence"]
                ratios[model] = plan["predicted"] / max(plan["divergence"], 1e-12)
        if ratios:
            result[f"predicted_over_measured_{point}"] = geometric_mean(ratios.values())
            result[f"prediction_error_{point}_worst"] = max(abs(ratio - 1) for ratio in ratios.values())
    return result
