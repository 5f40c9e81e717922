"""The runtime manager: simulated under load on recorded traces, and live around a plain loop.

*Simulated.* A batched server with costs measured on this machine serves what one of several equal servers gets of the
Azure traces, at 0.7, 1.0 and 1.3 times the rate that index 0 (all weights at 8 bits) can carry. Prompts are scaled, by
a factor for each trace, so that they take at most a quarter of index 0's service time. Each request is promised its
first token within a second and 200 ms for each further one. Beside the controller are index 0 always, the last index
always, and a clairvoyant that knows the trace. `slo_over_lowest` is the controller's share of requests that are served
as promised, over that of the last index. `kl_over_clairvoyant` is its mean KL over that of the clairvoyant, which
serves at least as many.

*Live.* See `foveate.bench.shared.live`.

Data are in the folder that `FOVEATE_DATA` names: `traces/` and the small language model `lm/`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from foveate.bench.shared.live import run_live
from foveate.bench.shared.result import BackgroundLoad, Measured
from foveate.bench.simulation.clairvoyant import Search, clairvoyant
from foveate.bench.simulation.costs import CostSizes, mean_level, server_costs, subject, timed
from foveate.bench.simulation.policies import WINDOW, Controlled, Outcome, run_controlled, run_static
from foveate.bench.simulation.server import Objective, ServerCosts
from foveate.bench.simulation.traces import FILES, Trace, read_trace, traces_folder
from foveate.errors import DataError
from foveate.files import parse_json, read_regular
from foveate.progress import say, track

#: Rates, as multiples of what index 0 can carry.
RATES = (0.7, 1.0, 1.3)
#: Prompts take at most this share of index 0's service time.
_PROMPT_SHARE = 0.25
#: The floor of the simulated server is the furthest index whose KL is at most this, in nats a token.
_FLOOR_KL = 0.1


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured.

    Attributes:
        costs: how the costs are measured.
        objective: what is promised to each request.
        search: how far the clairvoyant searches.
        minutes: how long the live loop runs; 0 leaves it out.
        requests: at most so many requests of a trace; None takes all.
        costs_file: a file of costs, as `costs` in an earlier result's rounds, in place of measuring them.
    """

    costs: CostSizes = field(default_factory=CostSizes)
    objective: Objective = field(default_factory=Objective)
    search: Search = field(default_factory=Search)
    minutes: float = 1.0
    requests: int | None = None
    costs_file: Path | None = None


def measure(sizes: Sizes | None = None) -> Measured:
    """Run both parts.

    Raises:
        DataError: the data are not there.
        MissingExtraError: transformers or numpy is not installed.
    """
    sizes = sizes or Sizes()
    folder = traces_folder()
    figures: dict[str, float] = {}
    rounds: list[dict[str, Any]] = []
    notes: list[str] = []
    small = None
    if sizes.costs_file is None or sizes.minutes > 0:
        say("quantizing the small language model")
        small = subject(Path(os.environ["FOVEATE_DATA"]), sizes.costs)
    if sizes.costs_file is not None:
        costs = _costs_in(sizes.costs_file)
    else:
        assert small is not None
        with BackgroundLoad() as load:
            iterations, prompts = timed(sizes.costs)
        notes.append(f"while the costs were timed, {load.note()}")
        costs = server_costs([mean_level(plan) for plan in small.frontier], small.kl, iterations, prompts)
    rounds.append({"costs": asdict(costs)})
    for name, file in FILES.items():
        found = _simulated(name, read_trace(folder / file), costs, sizes)
        figures |= found.figures
        rounds += [dict(one) for one in found.rounds]
        notes += found.notes
    if sizes.minutes > 0:
        assert small is not None
        live = run_live(small, sizes.minutes)
        figures |= live.figures
        rounds += live.rounds
        notes += live.notes
    return Measured(figures, rounds, notes)


def scaled(trace: Trace, costs: ServerCosts) -> tuple[Trace, float]:
    """The trace with prompts that take at most a quarter of index 0's service time, and the factor."""
    answer = costs.service(0, 0.0, trace.mean_generated)
    prompt = costs.service(0, trace.mean_prompt, 0.0)
    factor = min(1.0, answer * _PROMPT_SHARE / (1 - _PROMPT_SHARE) / prompt)
    return trace.with_prompts(factor), factor


def floor_of(costs: ServerCosts) -> int:
    """The furthest index whose KL is at most 0.1 nats a token."""
    return max(sum(kl <= _FLOOR_KL for kl in costs.kl) - 1, 0)


def _simulated(name: str, trace: Trace, costs: ServerCosts, sizes: Sizes) -> Measured:
    trace, factor = scaled(trace, costs)
    carried, last = costs.rate(0, trace), len(costs.kl) - 1
    set_to = Controlled(floor=floor_of(costs))
    figures: dict[str, float] = {f"prompt_factor_{name}": factor}
    rounds: list[dict[str, Any]] = []
    for rate in track(RATES, name):
        part = trace.at_rate(rate * carried)
        if sizes.requests is not None:
            part = part.part(0, sizes.requests)
        best = run_static(part, costs, sizes.objective, 0)
        lowest = run_static(part, costs, sizes.objective, last)
        ours = run_controlled(part, costs, sizes.objective, set_to)
        key = f"{name}_{rate:g}"
        figures[f"slo_{key}"] = ours.attainment
        figures[f"slo_static8_{key}"] = best.attainment
        figures[f"slo_lowest_{key}"] = lowest.attainment
        figures[f"slo_over_lowest_{key}"] = ours.attainment / lowest.attainment if lowest.attainment else float("nan")
        figures[f"kl_{key}"] = ours.kl
        figures[f"switches_per_hour_{key}"] = len(ours.switches) / ours.hours
        figures[f"switches_where_static8_meets_{key}"] = float(_needless(ours, best, part))
        if name == "conversation" and rate == RATES[-1]:
            known = clairvoyant(part, costs, sizes.objective, ours.indices, ours.attainment, sizes.search)
            figures[f"kl_over_clairvoyant_{key}"] = ours.kl / known.kl if known.kl else float("nan")
            figures[f"slo_clairvoyant_{key}"] = known.attainment
        rounds.append({"trace": name, "rate": rate, "requests_a_second": rate * carried, "requests": len(part),
                       "hours": ours.hours, "mean_index": ours.mean_index})  # fmt: skip
    note = (
        f"{name}: index 0 carries {carried:.3f} requests a second, the last {costs.rate(last, trace):.3f}; prompts "
        f"times {factor:.4f}; a floor at index {set_to.floor} of {last}"
    )
    return Measured(figures, rounds, (note,))


def _needless(ours: Outcome, static: Outcome, trace: Trace) -> int:
    """Switches in windows in which index 0 always serves all requests that arrive as promised, and some arrive."""
    met: dict[int, bool] = {}
    for arrival, good in zip(trace.arrivals, static.met, strict=True):
        window = int(arrival / WINDOW)
        met[window] = met.get(window, True) and good
    return sum(met.get(int(at / WINDOW), False) for at in ours.switches)


def _costs_in(file: Path) -> ServerCosts:
    """The costs in a file: the object itself, or a result of this benchmark that has them in its rounds."""
    try:
        data: Any = parse_json(read_regular(file, 1 << 26))
        if isinstance(data, Mapping) and "rounds" in data:
            data = next(part["costs"] for part in data["rounds"] if "costs" in part)
        return ServerCosts(
            kl=tuple(map(float, data["kl"])),
            iteration=tuple(tuple(map(float, row)) for row in data["iteration"]),
            prompt_token=tuple(map(float, data["prompt_token"])),
        )
    except (OSError, StopIteration, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file} holds no costs of a server: {error!r}") from error
