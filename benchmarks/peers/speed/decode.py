"""A whole model, token by token, beside llama.cpp: the figures of `foveate bench decode`, in turns with peers.

The peers are llama.cpp and ik_llama.cpp, a fork of it with kernels of its own for CPUs, whose figures start with `ik_`.
All sides continue a short prompt with the likeliest tokens, on the same number of threads, in alternating rounds. The
peers run `llama_decode`, with every matrix in one type, the output layer included; both read the same files. Where
there is no environment for a peer, or it fails, it is left out and a note says why.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace

from benchmarks.peers.child import SCRIPTS, Child, PeerError
from benchmarks.peers.environments import ENVIRONMENTS
from foveate.bench import decode
from foveate.bench.decode import Sizes
from foveate.bench.shared.result import Measured

log = logging.getLogger("foveate")
#: By level, the nearest type of llama.cpp.
TYPES = {2: "Q2_K", 3: "Q3_K_S", 4: "Q4_K_S", 6: "Q6_K", 8: "Q8_0"}
#: What the names of the fork's figures start with.
FORK = "ik_"


class LlamaCpp:
    """The model in llama.cpp or its fork, in a process of its own; a `foveate.bench.decode.Peer`.

    Args:
        sizes: how much is measured.
        child: the process.
        files: the file of each type, which it reads.
        bytes: the bytes that a token reads of each type.
    """

    def __init__(self, sizes: Sizes, child: Child, files: Mapping[str, str], bytes: Mapping[str, int]) -> None:
        self.sizes, self.child = sizes, child
        self.types: Mapping[int, str] = TYPES
        self.bytes = bytes
        self._batched = f"{sizes.batch} of {TYPES[decode.MIDDLE]}"  # the same file, in a context for several sequences
        child.ask("use", files={**files, self._batched: files[TYPES[decode.MIDDLE]]})
        self._load(self._batched, sizes.prompt + sizes.tokens, sizes.batch)
        for kind in TYPES.values():
            about = self._load(kind, sizes.positions, 1)
        self.notes: tuple[str, ...] = (f"{child.name} {about['version']}: {about['system'].strip(' |')}",)

    def _load(self, kind: str, context: int, sequences: int) -> Mapping[str, str]:
        return self.child.ask("load", type=kind, context=context, threads=self.sizes.threads, sequences=sequences)

    def decode(self, level: int, sequences: int = 1) -> float:
        """Seconds per token of each sequence, after the first."""
        kind = TYPES[level] if sequences == 1 else self._batched
        prompt, tokens = self.sizes.prompt, self.sizes.tokens
        answer = self.child.ask("decode", type=kind, prompt=prompt, tokens=tokens, sequences=sequences)
        return float(answer["seconds"])

    def prefill(self, level: int) -> float:
        """Seconds to the first token after a long prompt."""
        return float(self.child.ask("prefill", type=TYPES[level], tokens=self.sizes.prefill)["seconds"])


def measure(sizes: Sizes | None = None) -> Measured:
    """Measure all sides in turns, or only foveate where llama.cpp is not available.

    Args:
        sizes: how much is measured.
    """
    sizes = sizes or Sizes()
    notes: list[str] = []
    with ExitStack() as stack:
        result = decode.measure(sizes, _peers(sizes, stack, notes))
    figures = dict(result.figures)
    prefill = figures.pop(f"{FORK}prefill{sizes.prefill}_ratio_b{decode.MIDDLE}", None)
    if prefill is not None:
        figures[f"{FORK}prefill_ratio"] = prefill
    return replace(result, figures=figures, notes=(*notes, *result.notes))


def _peers(sizes: Sizes, stack: ExitStack, notes: list[str]) -> dict[str, LlamaCpp]:
    """The peers with their models loaded; those that are not available are left out, with a note of the reason."""
    environment = ENVIRONMENTS["llama-cpp"]
    if not environment.built:
        notes.append("ours only: `make bench-peers` makes an environment for llama.cpp and measures it too")
        return {}
    folder = environment.folder / "models"
    if not folder.exists():
        log.info("writing the model for llama.cpp in %d types, about two minutes", len(TYPES))
    try:
        child = stack.enter_context(Child("llama.cpp", environment.python, SCRIPTS / "llama_model.py"))
        made = child.ask("prepare", folder=str(folder), shape=asdict(sizes.shape), types=list(TYPES.values()))
        peers = {"": LlamaCpp(sizes, child, made["files"], made["bytes"])}
    except PeerError as error:
        notes.append(f"ours only: {error}")
        return {}
    fork = ENVIRONMENTS["ik-llama-cpp"]
    if not fork.built:
        notes.append("no ik_llama.cpp: `make bench-peers` makes an environment for it, where it can be compiled")
        return peers
    try:
        child = stack.enter_context(Child("ik_llama.cpp", fork.python, SCRIPTS / "ik_model.py"))
        peers[FORK] = LlamaCpp(sizes, child, made["files"], made["bytes"])
    except PeerError as error:
        notes.append(f"no ik_llama.cpp: {error}")
    return peers
