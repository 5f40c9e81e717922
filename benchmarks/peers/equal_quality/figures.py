"""The figures of the benchmark, from its rows.

Rows of quality have `side` (`ours` or `theirs`), `name`, `kl` and `bytes` of a token. Rows of time have `round`,
`name`, `cached` (tokens in the cache) and `seconds` of a token. Ours at the KL of a type is named `at TYPE`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import geometric_mean, median
from typing import Any

OURS, THEIRS = "ours", "theirs"
Row = Mapping[str, Any]


def at(kind: str) -> str:
    """The name of our map at the KL of a type."""
    return f"at {kind}"


def packed(kind: str) -> str:
    """The name of that map with a packed cache."""
    return f"{at(kind)}, packed cache"


def seconds(rows: Sequence[Row]) -> dict[tuple[str, int], dict[int, float]]:
    """By name and cached tokens: the seconds of each round."""
    found: dict[tuple[str, int], dict[int, float]] = {}
    for row in rows:
        if "seconds" in row:
            found.setdefault((row["name"], row["cached"]), {})[row["round"]] = row["seconds"]
    return found


def ratio(times: Mapping[tuple[str, int], Mapping[int, float]], ours: str, theirs: str, cached: int) -> float | None:
    """The median over rounds of our tokens a second over theirs; None if one of them was not timed."""
    own, other = times.get((ours, cached), {}), times.get((theirs, cached), {})
    shared = [other[number] / own[number] for number in own if number in other]
    return median(shared) if shared else None


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """The figures; those whose rows are missing are left out."""
    times = seconds(rows)
    quality = {(r["side"], r["name"]): r for r in rows if "kl" in r}
    short = min((cached for _, cached in times), default=0)
    result: dict[str, float] = {}
    tokens, sizes = [], []
    for (side, name), row in quality.items():
        label = name.replace(" ", "_").replace(".", "_")
        result[f"kl_{side}_{label}"] = row["kl"]
        result[f"bytes_{side}_{label}"] = row["bytes"]
        if (name, short) in times:
            result[f"tokens_per_second_{side}_{label}"] = 1 / median(times[name, short].values())
        if side != THEIRS or (own := quality.get((OURS, at(name)))) is None:
            continue
        result[f"bytes_at_equal_kl_{label}"] = own["bytes"] / row["bytes"]
        sizes.append(own["bytes"] / row["bytes"])
        for cached in sorted({c for _, c in times}):
            faster = ratio(times, at(name), name, cached)
            if faster is None:
                continue
            if cached == short:
                result[f"tokens_at_equal_kl_{label}"] = faster
                tokens.append(faster)
            else:
                result[f"tokens_at_equal_kl_{label}_cached_{cached}"] = faster
                if (faster := ratio(times, packed(name), name, cached)) is not None:
                    result[f"tokens_at_equal_kl_{label}_cached_{cached}_packed"] = faster
    types = sum(side == THEIRS for side, _ in quality)
    if types and len(sizes) == types:
        result["bytes_at_equal_kl"] = geometric_mean(sizes)
    if types and len(tokens) == types:
        result["tokens_at_equal_kl"] = geometric_mean(tokens)
    slower = ratio(times, uniform(8), uniform(3), short)
    if slower is not None:
        result["smol_tokens_ratio_b8_over_b3"] = slower
    return dict(sorted(result.items()))


def uniform(level: int) -> str:
    """The name of our map with every weight at one level."""
    return f"uniform {level}"
