"""A whole model, token by token, beside llama.cpp: the figures of `foveate bench decode`, in turns with a peer.

Both sides continue a short prompt with the likeliest tokens, on the same number of threads, in alternating rounds.
llama.cpp runs `llama_decode`, with every matrix in one type, the output layer included. Where there is no environment
for llama.cpp, or it fails, only foveate is measured and a note says why.
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


class LlamaCpp:
    """The model in llama.cpp, in a process of its own; a `foveate.bench.decode.Peer`."""

    def __init__(self, sizes: Sizes, child: Child) -> None:
        folder = ENVIRONMENTS["llama-cpp"].folder / "models"
        self.sizes, self.child = sizes, child
        self.types: Mapping[int, str] = TYPES
        if not folder.exists():
            log.info("writing the model for llama.cpp in %d types, about two minutes", len(TYPES))
        answer = child.ask("prepare", folder=str(folder), shape=asdict(sizes.shape), types=list(TYPES.values()))
        self.bytes: Mapping[str, int] = answer["bytes"]
        for kind in TYPES.values():
            about = self.child.ask("load", type=kind, context=sizes.positions, threads=sizes.threads)
        self.notes: tuple[str, ...] = (
            f"llama.cpp: llama-cpp-python {about['version']}, {about['system'].strip(' |')}",
        )

    def decode(self, level: int) -> float:
        """Seconds per token, after the first."""
        answer = self.child.ask("decode", type=TYPES[level], prompt=self.sizes.prompt, tokens=self.sizes.tokens)
        return float(answer["seconds"])

    def prefill(self, level: int) -> float:
        """Seconds to the first token after a long prompt."""
        return float(self.child.ask("prefill", type=TYPES[level], tokens=self.sizes.prefill)["seconds"])


def measure(sizes: Sizes | None = None) -> Measured:
    """Measure both sides in turns, or only foveate where llama.cpp is not available.

    Args:
        sizes: how much is measured.
    """
    sizes = sizes or Sizes()
    notes: list[str] = []
    with ExitStack() as stack:
        result = decode.measure(sizes, _llama_cpp(sizes, stack, notes))
    return replace(result, notes=(*notes, *result.notes))


def _llama_cpp(sizes: Sizes, stack: ExitStack, notes: list[str]) -> LlamaCpp | None:
    """llama.cpp with its models loaded; None, with a note of the reason, where it is not available."""
    environment = ENVIRONMENTS["llama-cpp"]
    if not environment.built:
        notes.append("ours only: `make bench-peers` makes an environment for llama.cpp and measures it too")
        return None
    try:
        child = stack.enter_context(Child("llama.cpp", environment.python, SCRIPTS / "llama_model.py"))
        return LlamaCpp(sizes, child)
    except PeerError as error:
        notes.append(f"ours only: {error}")
        return None
