"""serve: what bending is worth under load, and what a step costs beside the model.

The model is a Llama of random weights: time does not depend on them. Its chain is that of the uniform levels 8, 6, 4, 3
and 2, with made-up costs, since random weights have no loss; so nothing is said of quality here.

- *Saturation*: more clients than places, each asking again as soon as it is answered, few tokens of prompt and many of
  answer. The manager keeps the wait of the queue within its limit, against the same engine held at 8 bits. Rounds of
  both alternate.
- *A step*: the time of a decode step outside the model's forward over that of the forward, in a batch of 8.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from foveate.bench.shared.random_model import random_llama
from foveate.bench.shared.result import BackgroundLoad, Measured
from foveate.nn.levels import current_map
from foveate.nn.registry import registry_of
from foveate.precision.frontiers import Frontier
from foveate.precision.maps import uniform
from foveate.serve.extras import require_serving

_LEVELS = (8, 6, 4, 3, 2)
#: Made-up nats of each level, so that the manager has costs to go by.
_KL = (0.0, 0.001, 0.01, 0.1, 0.5)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured.

    Attributes:
        width, hidden, layers, heads, words: of the Llama; by default about 0.6 billion weights.
        batches: batch limits; the first decides `saturation_throughput_ratio`.
        seconds: of each side in each round.
        rounds: pairs of both sides.
        answer: tokens of an answer.
    """

    width: int = 1536
    hidden: int = 4096
    layers: int = 16
    heads: int = 16
    words: int = 32000
    batches: tuple[int, ...] = (4, 1, 8, 16)
    seconds: float = 20.0
    rounds: int = 2
    answer: int = 64


def measure(sizes: Sizes | None = None) -> Measured:
    """Throughput with and without bending, and the time of a step outside the model."""
    sizes = sizes or Sizes()
    require_serving()
    model = random_llama(
        vocab_size=sizes.words,
        hidden_size=sizes.width,
        intermediate_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=1024,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    registry = registry_of(model)
    chain = Frontier(tuple(uniform(registry.sites, level, registry.other_bytes) for level in _LEVELS))
    figures: dict[str, float] = {"billion_weights": sum(s.weights for s in current_map(model).weight_sites()) / 1e9}
    rounds: list[dict[str, Any]] = []
    with BackgroundLoad() as load:
        for batch in sizes.batches:
            ratios = []
            for _ in range(sizes.rounds):
                static = _throughput(model, chain, sizes, batch, bends=False)
                bent = _throughput(model, chain, sizes, batch, bends=True)
                ratios.append(bent["tokens_per_second"] / static["tokens_per_second"])
                rounds.append({"batch": batch, "static": static, "bent": bent})
            figures[f"throughput_ratio_batch_{batch}"] = statistics.median(ratios)
            figures[f"step_overhead_batch_{batch}"] = statistics.median(
                one[side]["step_overhead"] for one in rounds if one["batch"] == batch for side in ("static", "bent")
            )
    figures["saturation_throughput_ratio"] = figures[f"throughput_ratio_batch_{sizes.batches[0]}"]
    if 8 in sizes.batches:
        figures["step_overhead"] = figures["step_overhead_batch_8"]
    figures["requests_lost"] = float(sum(one[side]["lost"] for one in rounds for side in ("static", "bent")))
    notes = [
        "the weights are random and their costs made up: the figures are of time, not of quality",
        f"static is 8 bits; bent goes down to index {max(one['bent']['worst'] for one in rounds)} of 0..4",
        load.note(),
    ]
    return Measured(figures=figures, rounds=rounds, notes=notes)


def _throughput(model: Any, chain: Frontier, sizes: Sizes, batch: int, *, bends: bool) -> dict[str, float]:
    """Tokens a second of one engine under more load than it carries."""
    with _engine(model, chain, batch, bends=bends) as engine:
        return asyncio.run(_loaded(engine, sizes, batch))


@contextmanager
def _engine(model: Any, chain: Frontier, batch: int, *, bends: bool) -> Iterator[Any]:
    from foveate.runtime import Costs, Limits, ManagerOptions, Policy
    from foveate.serve.engine.engine import Engine
    from foveate.serve.options import ServeOptions, ServerLimits

    options = ServeOptions(
        name="random",
        bend=Limits(queue_wait=0.2) if bends else None,
        manager=ManagerOptions(
            background=False, status=False, costs=Costs(kl=_KL), policy=Policy(patience=0.1, dwell_down=0.1)
        ),
        limits=ServerLimits(batch=batch, batch_tokens=max(64, batch), cache_tokens=4096),
    )
    engine = Engine(model, None, chain, options)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(30.0)


async def _loaded(engine: Any, sizes: Sizes, batch: int) -> dict[str, float]:
    from foveate.serve.calls.fields import Call, Sampling
    from foveate.serve.engine.jobs import Ended

    call = Call(prompt=(1, 2, 3, 4), sampling=Sampling(temperature=0), max_tokens=sizes.answer)
    counted = {"tokens": 0, "answers": 0, "lost": 0, "worst": 0}
    until = time.monotonic() + sizes.seconds

    async def client() -> None:
        while time.monotonic() < until:
            job = engine.submit(call, [1, 2, 3, 4])
            event: Any = None
            while not isinstance(event, Ended):
                event = await job.events.get()
                counted["tokens"] += not isinstance(event, Ended) and time.monotonic() < until
            counted["answers"] += 1
            counted["lost"] += event.error is not None or job.produced != sizes.answer
            counted["worst"] = max(counted["worst"], job.given.worst or 0)

    await asyncio.gather(*(client() for _ in range(3 * batch)))
    times = engine.metrics.times
    return {
        "tokens_per_second": counted["tokens"] / sizes.seconds,
        "answers": float(counted["answers"]),
        "lost": float(counted["lost"]),
        "worst": float(counted["worst"]),
        "step_overhead": (times.whole - times.forward) / times.forward if times.forward else float("nan"),
        "decode_step_ms": 1e3 * times.whole / max(times.steps, 1),
    }
