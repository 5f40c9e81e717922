"""A whole model, token by token: a Llama of 0.6 B random weights on planes.

The model decodes greedily after a short prompt, as a user would run it: transformers' `generate`, whose pass runs all
blocks of the decoder in one op (`foveate.fuse`). One model serves all levels, switched by `foveate.apply`.

`tokens_per_second_b4` is the speed at 4 bits. `read_share_b4` is the share of the memory's bandwidth that decoding
reaches: the bytes that a token reads, over its time, over the read bandwidth in the same round.

`non_kernel_share` is 1 - (time of foveate's ops / time of a token), at 4 bits. The ops' calls in one pass of the model
are recorded with their arguments. Repeated one after the other, they give the time of the ops with their calls from
Python, and without the work between them. The time of a token is from the same round.

`peak_memory_over_computed` is measured in a fresh process that loads the model at 4 bits and decodes. It is the growth
of the highest resident size since before loading, over the computed bytes of the map, the cache and one token's
activations. The process does not compile, since a compiler's memory is no part of a model.

Other implementations of the model can take their turns in every round (`Peer`). A level and the nearest type of a peer
have different bytes, so

    tokens_ratio_b4 = (our tokens/s over theirs) x (our bytes a token over theirs)

and the bytes of both are figures too. `prefill512_ratio_b4` is not scaled, since a long prompt is bound by arithmetic.
Nor is `batch8_ratio_b4`, the ratio of speeds where eight sequences are decoded at once.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foveate.bench.fresh_process.run import run_in_fresh_process
from foveate.bench.limits.bandwidth import Blocks, fastest_loop
from foveate.bench.shared.extras import require
from foveate.bench.shared.random_model import random_llama
from foveate.bench.shared.result import Measured
from foveate.folder.save import save
from foveate.formats.levels import NESTED_LEVELS
from foveate.kernels.threads import threads
from foveate.kvcache.cache import quantized_cache
from foveate.memory.arena import arena
from foveate.nn.decoder.loop import decoding_loop
from foveate.nn.foreign.cache_argument import cache_argument
from foveate.nn.levels import apply
from foveate.nn.registry import registry_of
from foveate.precision.maps import uniform
from foveate.progress import track

#: The level at which prefill, several sequences, the share of the ops and the memory are measured.
MIDDLE = 4


@dataclass(frozen=True)
class Shape:
    """The shape of the model, with 0.59 B weights that a token reads."""

    width: int = 2048
    intermediate: int = 5632
    layers: int = 12
    heads: int = 32
    kv_heads: int = 4
    vocabulary: int = 32000

    def config(self, positions: int) -> dict[str, Any]:
        """The arguments of `transformers.LlamaConfig`."""
        return {
            "hidden_size": self.width,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": positions,
            "tie_word_embeddings": False,
        }


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        shape: the shape of the model.
        threads: the number of threads, for both sides.
        prompt, tokens: the tokens of the prompt and the tokens decoded in each turn.
        prefill: the tokens of the long prompt.
        batch: the sequences that are decoded at once in a further turn.
        rounds: the number of interleaved rounds; figures are medians over them.
        compiled: whether the model on planes runs block by block under `torch.compile`, with a static cache.
        read_bytes: the bytes of memory that the bandwidth is measured on.
    """

    shape: Shape = Shape()
    threads: int = 2
    prompt: int = 8
    tokens: int = 48
    prefill: int = 512
    batch: int = 8
    rounds: int = 7
    compiled: bool = False
    read_bytes: int = 512 << 20

    @property
    def positions(self) -> int:
        """The number of positions that the caches hold."""
        return self.prefill + self.prompt + self.tokens


class Clock:
    """A streamer for `generate` that records the time of the prompt and of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Record the time; `generate` calls it with the prompt and then with every token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing; `generate` calls it after the last token."""


def generate(
    model: Any,
    prompt: int,
    tokens: int,
    *,
    static: bool = False,
    compiled: bool = False,
    sequences: int = 1,
    cache_bits: int | None = None,
) -> list[float]:
    """Decode greedily after a prompt of so many tokens, in transformers' `generate` with foveate's loop.

    Args:
        model: a model of transformers.
        prompt, tokens: the number of tokens of the prompt, and to decode.
        static: whether the cache has a fixed size. transformers keeps the largest size so far from call to call.
        compiled: whether the pass of one token is compiled, which needs a static cache.
        sequences: how many prompts are continued at once, each of its own.
        cache_bits: bits of all but recent keys and values; exact ones if not given.

    Returns:
        The times at which the prompt and each token were ready.
    """
    ids = (torch.arange(prompt)[None] * 7919 + 1 + torch.arange(sequences)[:, None]) % model.config.vocab_size
    clock = Clock()
    options: dict[str, Any] = {"cache_implementation": "static"} if static else {}
    if cache_bits is not None:
        options |= cache_argument(model.generate, quantized_cache(model.config, cache_bits))
    if compiled:
        options["compile_config"] = require("transformers").CompileConfig(mode="default", fullgraph=False)
        options["compile_config"]._compile_all_devices = True  # transformers compiles for GPUs only unless told so
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=clock,
            **({} if compiled else {"custom_generate": functools.partial(decoding_loop, streamer=clock)}),
            **options,
        )
    return clock.times


class _Recorder(TorchDispatchMode):
    """Records the calls of foveate's ops. Levels are tensors, so a repeated call reads at the levels then in force."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "foveate":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class Ours:
    """The model on planes, timed at any level."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.model: Any = random_llama(**sizes.shape.config(sizes.positions))
        registry = registry_of(self.model)
        self.maps = {level: uniform(registry.sites, level, registry.other_bytes) for level in NESTED_LEVELS}
        with torch.inference_mode():
            self.model(torch.zeros(1, 1, dtype=torch.int64))  # compares the op with the blocks, once
        with torch.inference_mode(), _Recorder() as recorder:
            self.model(torch.zeros(1, 1, dtype=torch.int64))
        self._calls = recorder.calls

    def decode(self, level: int, prompt: int | None = None, sequences: int = 1) -> float:
        """Seconds per token of each sequence, after the first."""
        apply(self.model, self.maps[level])
        length, compiled = prompt or self.sizes.prompt, self.sizes.compiled
        times = generate(
            self.model, length, self.sizes.tokens + 1, static=compiled, compiled=compiled, sequences=sequences
        )
        return (times[-1] - times[1]) / self.sizes.tokens

    def prefill(self, level: int) -> float:
        """Seconds from the call to the first token after a long prompt."""
        apply(self.model, self.maps[level])
        started = time.perf_counter()
        return generate(self.model, self.sizes.prefill, 1)[1] - started

    def kernels(self, level: int) -> float:
        """Seconds per token of foveate's ops alone."""
        apply(self.model, self.maps[level])
        with torch.inference_mode():
            started = time.perf_counter()
            for _ in range(self.sizes.tokens):
                for op, args, kwargs in self._calls:
                    op(*args, **kwargs)
            return (time.perf_counter() - started) / self.sizes.tokens

    def memory(self, level: int) -> dict[str, int]:
        """The bytes that a fresh process takes to decode, and the computed bytes."""
        with tempfile.TemporaryDirectory() as folder:
            save(self.model, Path(folder) / "model", keep=self.maps[level])
            sizes = (self.sizes.threads, self.sizes.prompt, self.sizes.tokens)
            return run_in_fresh_process(
                "foveate.bench.fresh_process.decode", str(Path(folder) / "model"), *map(str, sizes)
            )


class Peer(Protocol):
    """The same model in another library, ready to decode.

    Attributes:
        types: for each level, the name in figures of the nearest type.
        bytes: for each type, the bytes that a token reads.
        notes: sentences about the peer for a reader of the figures.
    """

    types: Mapping[int, str]
    bytes: Mapping[str, int]
    notes: tuple[str, ...]

    def decode(self, level: int, sequences: int = 1) -> float:
        """Seconds per token of each sequence, after the first."""

    def prefill(self, level: int) -> float:
        """Seconds to the first token after a long prompt."""


def measure(sizes: Sizes | None = None, peers: Mapping[str, Peer] | None = None) -> Measured:
    """Measure the model on planes, alone or in turns with peers.

    Args:
        sizes: how much is measured.
        peers: other implementations, which are measured in every round, by what their figures' names start with.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    sizes, peers = sizes or Sizes(), peers or {}
    with threads(sizes.threads):
        ours = Ours(sizes)
        memory = ours.memory(MIDDLE)
        block = Blocks([arena([sizes.read_bytes])[0].fill_(1)])
        loop = fastest_loop(block, rounds=3)
        rounds = []
        for number in track(range(sizes.rounds + 1), "rounds"):
            before = block.bandwidth(loop)
            found = {"round": number, **_round(ours, peers)}
            found["bandwidth"] = (before + block.bandwidth(loop)) / 2
            if number:  # the first round compiles and warms up
                rounds.append(found)
    sizes_read = {f"b{level}": plan.bytes_read for level, plan in ours.maps.items()}
    for start, peer in peers.items():
        sizes_read |= {f"{start}{kind}": size for kind, size in peer.bytes.items()}
    note = f"memory of the fresh process, bytes: {', '.join(f'{k} {v}' for k, v in memory.items())}"
    figures = _figures(rounds, sizes_read, memory, sizes)
    for start, peer in peers.items():
        figures |= _ratios(rounds, start, peer.types, sizes_read, sizes)
    return Measured(figures, rounds, (*(said for peer in peers.values() for said in peer.notes), note))


def _round(ours: Ours, peers: Mapping[str, Peer]) -> dict[str, float]:
    """One round: the seconds of each measurement, by name."""
    batch = ours.sizes.batch
    found = {}
    for level in NESTED_LEVELS:
        found[f"b{level}"] = ours.decode(level)
        for start, peer in peers.items():
            found[f"{start}{peer.types[level]}"] = peer.decode(level)
    found["prefill"] = ours.prefill(MIDDLE)
    found |= {f"{start}prefill_theirs": peer.prefill(MIDDLE) for start, peer in peers.items()}
    found["batch"] = ours.decode(MIDDLE, sequences=batch)
    found |= {f"{start}batch_theirs": peer.decode(MIDDLE, batch) for start, peer in peers.items()}
    found["token"] = ours.decode(MIDDLE, prompt=1)
    found["kernels"] = ours.kernels(MIDDLE)
    return found


def _figures(
    rounds: list[dict[str, float]], sizes_read: Mapping[str, int], memory: Mapping[str, int], sizes: Sizes
) -> dict[str, float]:
    """The figures of ours alone."""
    seen: dict[str, list[float]] = defaultdict(list)
    for r in rounds:
        for level in NESTED_LEVELS:
            own = f"b{level}"
            seen[f"read_share_{own}"].append(sizes_read[own] / r[own] / r["bandwidth"])
            seen[f"tokens_per_second_{own}"].append(1 / r[own])
        seen[f"prefill_tokens_per_second_b{MIDDLE}"].append(sizes.prefill / r["prefill"])
        seen[f"batch{sizes.batch}_tokens_per_second_b{MIDDLE}"].append(sizes.batch / r["batch"])
        seen["non_kernel_share"].append(1 - r["kernels"] / r["token"])
    figures = {name: median(values) for name, values in sorted(seen.items())}
    figures |= {f"model_bytes_{name}": size for name, size in sizes_read.items()}
    computed = memory["weights"] + memory["cache"] + memory["activations"]
    return figures | {"peak_memory_over_computed": memory["peak"] / computed}


def _ratios(
    rounds: list[dict[str, float]], start: str, types: Mapping[int, str], sizes_read: Mapping[str, int], sizes: Sizes
) -> dict[str, float]:
    """The figures of a peer, and of ours over it."""
    seen: dict[str, list[float]] = defaultdict(list)
    for r in rounds:
        for level in NESTED_LEVELS:
            own, kind = f"b{level}", f"{start}{types[level]}"
            scale = sizes_read[own] / sizes_read[kind]
            seen[f"{start}tokens_ratio_{own}"].append(r[kind] / r[own] * scale)
            seen[f"tokens_per_second_{kind}"].append(1 / r[kind])
        prefill, batch = r[f"{start}prefill_theirs"], r[f"{start}batch_theirs"]
        kind = f"{start}{types[MIDDLE]}"
        seen[f"{start}prefill{sizes.prefill}_ratio_b{MIDDLE}"].append(prefill / r["prefill"])
        seen[f"prefill_tokens_per_second_{kind}"].append(sizes.prefill / prefill)
        seen[f"{start}batch{sizes.batch}_ratio_b{MIDDLE}"].append(batch / r["batch"])
        seen[f"batch{sizes.batch}_tokens_per_second_{kind}"].append(sizes.batch / batch)
    return {name: median(values) for name, values in sorted(seen.items())}
