"""trace: an hour of recorded requests, in minutes, on one server: held at its best map, and with every decider.

The Azure conversation trace is shared among equal servers, compressed in time, and its prompts and answers are scaled
to the model. The rate is `load` times what the server carries at index 0, which is measured first. Both sides get the
same requests at the same times:

- *static*: index 0 from beginning to end;
- *all deciders*: the manager keeps the wait of the queue, inputs choose between two maps around the index, importance
  follows what is asked, and the planes have a limit of memory. In the second third of the time an operator takes a part
  of the memory away. At the end they are withdrawn, and what is left must be what was before.

Without a folder the model is the mixture of experts of the benchmark `importance`, and each quarter of the time has
requests from another text. A request is served as promised if its first token comes within a second, and each further
one within 200 ms on average.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.bench.importance.mixture import MIXTURE, default_cache, texts, trained, windows
from foveate.bench.importance.stream import Lengths, subject
from foveate.bench.shared.extras import require
from foveate.bench.shared.result import BackgroundLoad, Measured
from foveate.bench.simulation.server import Objective
from foveate.bench.simulation.traces import FILES, Trace, read_trace, traces_folder
from foveate.errors import DataError
from foveate.folder.load import load
from foveate.folder.resize import memory_report
from foveate.folder.save import save
from foveate.nn.levels import state_of
from foveate.progress import say
from foveate.serve.extras import require_serving


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured.

    Attributes:
        model: a folder with a language model, its profile and its tokenizer; the mixture if None.
        minutes: how long each side serves what is an hour of the trace.
        load: the rate of requests, as a multiple of what index 0 carries.
        share: the part of a model's planes that fits into the memory of the second side, and that which is left in the
            second third of the time.
        prompt, answer: mean tokens of a prompt, and of an answer; the longest are four times as long.
        batch: requests that are computed together.
        window: tokens of a window that inputs which choose are calibrated on.
    """

    model: str | None = None
    minutes: float = 6.0
    load: float = 0.7
    share: tuple[float, float] = (0.8, 0.5)
    prompt: int = 64
    answer: int = 32
    batch: int = 8
    window: int = 96


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request of the replay: when, in seconds, its prompt, and how many tokens its answer has."""

    at: float
    prompt: tuple[int, ...]
    answer: int


def measure(sizes: Sizes | None = None) -> Measured:
    """Replay the trace on both sides."""
    sizes = sizes or Sizes()
    if not sizes.minutes > 0:
        raise DataError(f"minutes (={sizes.minutes:g}) for the hour of the trace are not more than 0")
    require_serving()
    require("transformers")
    trace = read_trace(traces_folder() / FILES["conversation"])
    with tempfile.TemporaryDirectory() as place, BackgroundLoad() as background:
        folder, streams = _subject(sizes, Path(place))
        carried = _carried(load(folder), streams, trace, sizes)
        asks = requests(trace, streams, sizes, carried)
        say(f"index 0 carries {carried:.2f} requests a second; {len(asks)} requests a side")
        static = _side(load(folder), streams, asks, sizes, deciders=False)
        everything = _side(_within(folder, sizes.share[0]), streams, asks, sizes, deciders=True)
    figures = {"requests": float(len(asks)), "carried_per_second": carried}
    figures |= {f"static_{name}": value for name, value in static.items()} | everything
    figures["attainment_over_static"] = everything["attainment"] / max(static["attainment"], 1e-9)
    notes = [
        f"an hour of the conversation trace in {sizes.minutes:g} minutes, at {sizes.load:g} times what index 0 carries",
        f"memory for {sizes.share[0]:.0%} of the planes, and {sizes.share[1]:.0%} in the second third of the time",
        background.note(),
    ]
    return Measured(figures=figures, rounds=[{"static": static, "all": everything}], notes=notes)


def _subject(sizes: Sizes, place: Path) -> tuple[Path, list[Tensor]]:
    """A folder with a model, and the tokens of the texts that requests are cut from, one after another."""
    sources = texts()
    if sizes.model is None:
        one = subject(trained(MIXTURE, sources, default_cache()), sources, Lengths())
        save(one.model, place / "mixture")
        return place / "mixture", [text.held_out.long() for text in sources.values()]
    folder = Path(sizes.model)
    tokenizer = require("transformers").AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encoded = [
        tokenizer(bytes(text.held_out[: 1 << 18].tolist()).decode(errors="replace")) for text in sources.values()
    ]
    return folder, [torch.tensor(one["input_ids"]) for one in encoded]


def requests(trace: Trace, streams: Sequence[Tensor], sizes: Sizes, carried: float) -> list[Ask]:
    """The requests of one server: the trace compressed in time, at a multiple of what the server carries.

    Args:
        trace: the recorded requests.
        streams: the tokens of each text; each has an equal part of the time.
        sizes: the lengths, the time and the load.
        carried: requests a second that index 0 carries.
    """
    seconds = 60.0 * sizes.minutes
    squeezed = Trace(
        arrivals=tuple(at * seconds / trace.arrivals[-1] for at in trace.arrivals),
        prompts=trace.prompts,
        generated=trace.generated,
    ).at_rate(sizes.load * carried)
    choice = random.Random(0)
    asks = []
    factors = sizes.prompt / trace.mean_prompt, sizes.answer / trace.mean_generated
    for at, recorded, generated in zip(squeezed.arrivals, squeezed.prompts, squeezed.generated, strict=True):
        prompt = min(max(2, round(factors[0] * recorded)), 4 * sizes.prompt)
        answer = min(max(1, round(factors[1] * generated)), 4 * sizes.answer)
        stream = streams[min(int(len(streams) * at / seconds), len(streams) - 1)]
        start = choice.randrange(len(stream) - prompt)
        asks.append(Ask(at=at, prompt=tuple(stream[start : start + prompt].tolist()), answer=answer))
    return asks


def _carried(model: nn.Module, streams: Sequence[Tensor], trace: Trace, sizes: Sizes) -> float:
    """Requests a second that index 0 carries: so many clients that a batch is always full."""
    asks = requests(trace, streams, sizes, 200.0 / (60.0 * sizes.minutes * sizes.load))[:200]

    async def once(engine: Any) -> float:
        waiting = iter(asks)

        async def client() -> None:
            for ask in waiting:
                await _answered(engine, ask)

        began = time.monotonic()
        await asyncio.gather(*(client() for _ in range(2 * sizes.batch)))
        return len(asks) / (time.monotonic() - began)

    async def run(engine: Any) -> float:
        await once(engine)  # the first requests wait for what is made once
        carried = await once(engine)
        await _ended(engine)
        return carried

    with _engine(model, streams, sizes, deciders=False) as engine:
        return asyncio.run(run(engine))


def _within(folder: Path, share: float) -> nn.Module:
    """A model with memory for a part of its planes."""
    model = load(folder, memory="64GiB")
    report = memory_report(model)
    return load(folder, memory=report.fixed + int(share * report.stored))


@contextmanager
def _engine(model: nn.Module, streams: Sequence[Tensor], sizes: Sizes, *, deciders: bool) -> Iterator[Any]:
    from foveate.importance import Caution, Decay, Shadow, TrackingOptions
    from foveate.runtime import Limits, ManagerOptions
    from foveate.serve.engine.control import served_frontier
    from foveate.serve.engine.engine import Engine
    from foveate.serve.options import ADAPTING_POINTS, ServeOptions, ServerLimits

    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.cat([windows(s, 2, sizes.window, generator) for s in streams])} for _ in range(4)]
    follow = TrackingOptions(
        decay=Decay(keep=0.5, tokens=4096),
        decide_every=4096,
        caution=Caution(margin=0.02),
        shadow=Shadow(calls=4, tokens=sizes.window),
        by_hand=True,
    )
    options = ServeOptions(
        name="trace",
        bend=Limits(queue_wait=0.2) if deciders else None,
        manager=ManagerOptions(background=False, status=False),
        limits=ServerLimits(batch=sizes.batch, cache_tokens=16384, waiting=100_000, waiting_tokens=1 << 30),
        adapt_on=batches if deciders else (),
        follow=follow if deciders else None,
    )
    engine = Engine(model, None, served_frontier(model, ADAPTING_POINTS, whole=not deciders), options)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(30.0)


async def _answered(engine: Any, ask: Ask) -> tuple[float, float, bool]:
    """(seconds to the first token, mean seconds of the others, whether the answer is whole) of one request."""
    from foveate.serve.calls.fields import Call, Sampling
    from foveate.serve.engine.jobs import Ended

    sampling = Sampling(temperature=0.7, seed=1)
    call = Call(prompt=ask.prompt, sampling=sampling, max_tokens=ask.answer, ignore_eos=True)
    job = engine.submit(call, ask.prompt)
    event: Any = None
    while not isinstance(event, Ended):
        event = await job.events.get()
    whole = event.error is None and job.produced == ask.answer
    first = (job.first or job.arrived) - job.arrived
    return first, ((job.latest or 0.0) - (job.first or 0.0)) / max(ask.answer - 1, 1), whole


def _side(
    model: nn.Module, streams: Sequence[Tensor], asks: Sequence[Ask], sizes: Sizes, *, deciders: bool
) -> dict[str, float]:
    """The figures of one side."""
    before = state_of(model)
    with _engine(model, streams, sizes, deciders=deciders) as engine:
        seen: dict[str, list[float]] = {"index": [], "chosen": [], "resident": []}
        answers = asyncio.run(_replayed(engine, asks, sizes, seen, memory_report(model).stored if deciders else 0))
        figures = _served(answers)
        if deciders:
            figures |= _decided(engine, seen)
    if deciders:
        left = state_of(model)
        others = (left.indices, left.floors, left.requests, left.raises, left.adaptations)
        figures["left_as_before"] = float(set(left.frontiers) == set(before.frontiers) and not any(others))
        figures["reads_below_the_map"] = float(sum(memory_report(model).fallback_count.values()))
    return figures


async def _replayed(
    engine: Any, asks: Sequence[Ask], sizes: Sizes, seen: dict[str, list[float]], stored: int
) -> list[tuple[float, float, bool]]:
    """Send each request at its time; where planes have a limit, take memory away in the second third of the time."""
    control, began, seconds = engine.control, time.monotonic(), 60.0 * sizes.minutes
    tasks: list[asyncio.Future[tuple[float, float, bool]]] = []

    async def watch() -> None:
        moves = [(seconds / 3, sizes.share[1]), (2 * seconds / 3, sizes.share[0])] if stored else []
        while True:
            await asyncio.sleep(0.25)
            if moves and time.monotonic() - began > moves[0][0]:
                room = memory_report(engine.model).fixed + int(moves.pop(0)[1] * stored)
                await asyncio.wrap_future(engine.ask(partial(control.resize, room)))
            seen["index"].append(control.index)
            if control.deciders.mean_bits is not None:
                seen["chosen"].append(control.deciders.mean_bits)
            if control.resident_bytes is not None:
                seen["resident"].append(control.resident_bytes)

    watching = asyncio.ensure_future(watch())
    for ask in asks:
        await asyncio.sleep(max(0.0, began + ask.at - time.monotonic()))
        tasks.append(asyncio.ensure_future(_answered(engine, ask)))
    answers = await asyncio.gather(*tasks)
    watching.cancel()
    await _ended(engine)
    return answers


async def _ended(engine: Any) -> None:
    """Wait until the engine has told this event loop all that it has to tell."""
    while engine.jobs.all():
        await asyncio.sleep(0.01)


def _served(answers: Sequence[tuple[float, float, bool]]) -> dict[str, float]:
    promised = Objective()
    kept = [whole and first <= promised.first_token and each <= promised.per_token for first, each, whole in answers]
    firsts = sorted(first for first, _, _ in answers)
    return {
        "attainment": sum(kept) / len(answers),
        "requests_lost": float(sum(not whole for _, _, whole in answers)),
        "first_token_p50": statistics.median(firsts),
        "first_token_p99": firsts[min(int(0.99 * len(firsts)), len(firsts) - 1)],
    }


def _decided(engine: Any, seen: dict[str, list[float]]) -> dict[str, float]:
    control = engine.control
    verdict = control.deciders.tracker.verdict
    return {
        "mean_index": statistics.fmean(seen["index"]),
        "worst_index": max(seen["index"]),
        "switches": float(sum(control.switches.values())),
        "importance_moves": float(verdict.moves),
        "importance_refused": float(len(verdict.decisions) - verdict.moves),
        "chosen_bits_least": min(seen["chosen"], default=float("nan")),
        "chosen_bits_most": max(seen["chosen"], default=float("nan")),
        "resident_least_over_most": min(seen["resident"]) / max(seen["resident"]),
        "manager_fault": float(bool(control.fault)),
    }
