"""The loss and the memory of packed key/value caches: `python -m benchmarks cache`.

Real Llamas read real text: the first half of each window as a prompt, the rest token by token, as if it had been
generated. The logits are compared with those that the model gives with an exact cache: KL in nats per token.

Maps are calibrated on other text. `cache_kl_b4` is of a map of 4 bits per number on average, with ranges counted and
recent tokens exact. It is compared with transformers' own QuantizedCache (quanto and hqq, in an environment of its
own), where our map takes the bytes of theirs. Bytes are a mean over all steps. They count codes, ranges or scales and
zero points, and exact tokens; every number that is not a code counts as 16 bits on both sides.

Memory is measured on a long cache of a 16-bit model and of a 32-bit model, beside the exact cache of the same dtype.

Legend: n windows, T tokens, B windows at a time, V vocabulary, H heads, D channels per head.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.models.cases import VARIABLE, Case, babyllama105, data_folder, mixed_llama, stories260k
from benchmarks.peers.child import SCRIPTS, Child, PeerError
from benchmarks.peers.environments import ENVIRONMENTS
from foveate.bench.shared.extras import require
from foveate.bench.shared.result import Measured
from foveate.collect.objectives import Logits
from foveate.errors import BudgetError
from foveate.kvcache.cache import WINDOW, quantized_cache
from foveate.kvcache.calibrate import calibrate_cache
from foveate.kvcache.profile import CacheProfile
from foveate.nn.foreign.cache_argument import cache_argument
from foveate.precision.budgets import Budget
from foveate.precision.maps import PrecisionMap
from foveate.progress import log

BITS = (3.0, 3.5, 4.0, 4.5)
LEVELS = (2, 4, 8)
LONG = 4096
#: Tokens that transformers keeps exact before it packs everything anew: its default.
RESIDUAL = 128
PEER_GROUP = 64
PEER_BITS = (4, 2)
_BATCH = 64
_ROUNDS = 7
_STEPS = 8


@dataclass(frozen=True)
class Setting:
    """One of transformers' quantized caches.

    Attributes:
        backend, bits, axis_key, axis_value: as `transformers.QuantizedCache` takes them.
    """

    backend: str
    bits: int
    axis_key: int
    axis_value: int

    @property
    def name(self) -> str:
        """The setting in a few words."""
        return f"{self.backend} {self.bits} bits, axes {self.axis_key} {self.axis_value}"

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `transformers.QuantizedCache`."""
        return {
            "backend": self.backend,
            "nbits": self.bits,
            "axis_key": self.axis_key,
            "axis_value": self.axis_value,
            "q_group_size": PEER_GROUP,
            "residual_length": RESIDUAL,
        }

    def bytes_at(self, prompt: int, steps: int) -> float:
        """The bytes of all tokens held, for one number per token, as the mean over all steps.

        Scales and zero points count 16 bits each.
        """
        packed = (self.bits + 32 / PEER_GROUP) / 8
        totals, held, exact = [], prompt, 0
        for _ in range(steps):
            exact += 1
            if exact >= RESIDUAL:
                held, exact = held + exact, 0
            totals.append(held * packed + exact * 2)
        return statistics.mean(totals)


SETTINGS = tuple(
    Setting(backend, bits, key, value)
    for bits in PEER_BITS
    # its defaults, and keys by channel as in KIVI
    for backend, key, value in (("quanto", 0, 0), ("quanto", -1, 0), ("quanto", -1, -1), ("hqq", 0, 0), ("hqq", 1, 1))
)


def measure() -> Measured:
    """Measure the Llamas of the data folder; without one, no figures and a note that says so."""
    folder = data_folder()
    if folder is None:
        return Measured({}, (), (f"skipped: {VARIABLE} is not set, and it names the folder with models and data",))
    return measure_cases(load(folder) for load in (stories260k, babyllama105, mixed_llama))


def measure_cases(chosen: Iterable[Case], settings: Sequence[Setting] = SETTINGS) -> Measured:
    """Measure the given models, beside the given settings of transformers."""
    rounds: list[dict[str, Any]] = []
    notes: list[str] = []
    with _Transformers() as peers:
        for case in chosen:
            started = time.perf_counter()
            text = Text(case)
            profile = calibrate_cache(case.model, case.calibration, progress=False)
            rounds += own_rows(case, text, profile)
            peer_results, peer_notes = peer_rows(case, text, profile, settings, peers)
            rounds += peer_results
            notes += peer_notes
            rounds += [{"model": case.name, **row} for row in memory(case.model, profile)]
            rounds.append({"model": case.name, **step_times(case.model, profile, text)})
            log.info("%s: %.0f s", case.name, time.perf_counter() - started)
        notes += peers.versions
    return Measured(figures(rounds), rounds, list(dict.fromkeys(notes)))


class Text:
    """Held-out windows, and the model's logits of their second halves with an exact cache.

    Attributes:
        ids_nT: tokens.
        prompt: tokens that are read at once.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.ids_nT = torch.cat(list(case.evaluation))
        self.prompt = self.ids_nT.shape[1] // 2
        with torch.inference_mode():
            model: Any = case.model
            parts = [model(ids_BT).logits[:, self.prompt :] for ids_BT in self.ids_nT.split(_BATCH)]
        self.wanted = torch.cat(parts)

    @property
    def steps(self) -> int:
        """Tokens that are read one at a time."""
        return self.ids_nT.shape[1] - self.prompt

    @torch.inference_mode()
    def divergence(self, make: Callable[[], Any]) -> float:
        """The KL divergence of the model with caches that `make` returns."""
        model: Any = self.case.model
        logits = []
        for ids_BT in self.ids_nT.split(_BATCH):
            past = cache_argument(model, make())
            model(ids_BT[:, : self.prompt], **past)
            steps = [model(ids_B1, **past).logits for ids_B1 in ids_BT[:, self.prompt :].split(1, dim=1)]
            logits.append(torch.cat(steps, 1))
        return self.divergence_of(torch.cat(logits))

    def divergence_of(self, logits_nTV: Tensor) -> float:
        """The KL divergence of these logits from the exact ones."""
        apart = [Logits().divergence(a, b).double() for a, b in zip(self.wanted, logits_nTV, strict=True)]
        return float(torch.stack(apart).mean())

    def own_bytes_at(self, bits: float, block: int) -> float:
        """The bytes of our cache with numbers of `bits` bits, counted as `Setting.bytes_at` does."""
        totals = []
        for held in range(self.prompt + 1, self.ids_nT.shape[1] + 1):
            packed = max(held - WINDOW, 0) // block * block
            totals.append(packed * bits / 8 + (held - packed) * 2)
        return statistics.mean(totals)


def own_rows(case: Case, text: Text, profile: CacheProfile) -> Iterator[dict[str, Any]]:
    """Uniform levels, and maps of some average bits."""
    config: Any = case.model.config
    plans = {f"uniform {level}": profile.uniform(level) for level in LEVELS}
    plans |= {f"{bits:g} bits": profile.plan(Budget(bits=bits)) for bits in BITS}
    for name, plan in plans.items():
        yield {
            "model": case.name,
            "map": name,
            "bits": plan.cache_bits,
            "divergence": text.divergence(lambda plan=plan: quantized_cache(config, plan)),  # type: ignore[misc]
            "predicted": plan.predicted_loss,
        }


def peer_rows(
    case: Case, text: Text, profile: CacheProfile, settings: Sequence[Setting], peers: _Transformers
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of every setting, with ours at its bytes, and notes on what could not be measured."""
    config: Any = case.model.config
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    known: dict[PrecisionMap, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for setting in settings:
            try:
                theirs = text.divergence_of(peers.decode(setting, text, Path(scratch)))
            except PeerError as error:
                notes.append(f"{case.name}: {setting.name}: not measured: {error}")
                continue
            size = setting.bytes_at(text.prompt, text.steps)
            plan = _within(profile, text, size)
            if plan is None:
                notes.append(f"{case.name}: {setting.name}: no map of ours is as small")
                continue
            if plan not in known:
                known[plan] = text.divergence(lambda plan=plan: quantized_cache(config, plan))  # type: ignore[misc]
            row = {"model": case.name, "peer": setting.name, "peer_bits": setting.bits, "divergence": theirs}
            rows.append({**row, "ours": known[plan], "our_bits": plan.cache_bits, "ratio": known[plan] / theirs})
    return rows, notes


def _within(profile: CacheProfile, text: Text, size: float) -> PrecisionMap | None:
    """The best map of ours that takes at most `size` bytes, as `Setting.bytes_at` counts them."""
    block = profile.sites[0].group
    # bytes are linear in the bits of what is packed
    none, one = text.own_bytes_at(0, block), text.own_bytes_at(1, block)
    try:
        return profile.plan(Budget(bits=(size - none) / (one - none)))
    except BudgetError:
        return None


class _Transformers:
    """The process that runs transformers' own caches."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self.versions: list[str] = []

    def decode(self, setting: Setting, text: Text, folder: Path) -> Tensor:
        """Logits [n, T, V]; raises `PeerError`."""
        numpy = require("numpy")
        environment = ENVIRONMENTS["caches"]
        if not environment.built:
            raise PeerError("there is no environment for it: `make bench-peers` makes it")
        files = {name: folder / f"{name}.npz" for name in ("tokens", "logits")}
        if not files["tokens"].exists():
            model: Any = text.case.model
            model.save_pretrained(folder / "model")
            numpy.savez(files["tokens"], tokens=text.ids_nT.numpy())
        if self._child is None:
            self._child = Child("transformers", environment.python, SCRIPTS / "caches.py")
        try:
            answer = self._child.ask(
                "decode",
                model=str(folder / "model"),
                tokens=str(files["tokens"]),
                prompt=text.prompt,
                settings=setting.arguments,
                out=str(files["logits"]),
            )
        except PeerError:
            self._child.close()
            self._child = None
            raise
        self.versions = list(dict.fromkeys([*self.versions, f"transformers {answer['version']}"]))
        with numpy.load(files["logits"], allow_pickle=False) as held:
            return torch.from_numpy(held["logits"])

    def __enter__(self) -> _Transformers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.close()


def memory(model: Any, profile: CacheProfile) -> Iterator[dict[str, Any]]:
    """Bytes of a long cache at 4 bits on average, and of the exact one of the same type."""
    transformers = require("transformers")
    plan = profile.plan(Budget(bits=4.0))
    heads, width = profile.sites[0].rows, profile.sites[0].columns
    for dtype in (torch.float16, torch.float32):
        ours, exact = quantized_cache(model.config, plan), transformers.DynamicCache(config=model.config)
        states = torch.randn(1, heads, LONG, width, generator=torch.Generator().manual_seed(0)).to(dtype)
        for cache in (ours, exact):
            for i in range(len(cache.layers)):
                cache.update(states, states, i)
        size = sum(t.numel() * t.element_size() for layer in exact.layers for t in (layer.keys, layer.values))
        name = str(dtype).removeprefix("torch.")
        layer = 2 * states.numel() * states.element_size()
        yield {"dtype": name, "tokens": LONG, "bytes": ours.nbytes, "exact_bytes": size, "one_layer": layer}


@torch.inference_mode()
def step_times(model: Any, profile: CacheProfile, text: Text) -> dict[str, Any]:
    """Seconds per token with our cache at 4 bits and with the exact one, in turns, for one sequence."""
    transformers = require("transformers")
    plan = profile.plan(Budget(bits=4.0))
    ids = text.ids_nT[:1]
    caches = {"ours": quantized_cache(model.config, plan), "exact": transformers.DynamicCache(config=model.config)}
    for cache in caches.values():
        model(ids[:, :-_STEPS], **cache_argument(model, cache))
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    for _ in range(_ROUNDS):
        for name, kept in caches.items():
            past = cache_argument(model, copy.deepcopy(kept))
            started = time.perf_counter()
            for ids_11 in ids[:, -_STEPS:].split(1, dim=1):
                model(ids_11, **past)
            seconds[name].append((time.perf_counter() - started) / _STEPS)
    return {"step_seconds": seconds, "context": ids.shape[1]}


def figures(rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The figures that summarize the rounds."""
    result: dict[str, float] = {}
    own = [r for r in rounds if "map" in r]
    for r in own:
        name = r["map"].replace("uniform ", "uniform_b").replace(" bits", "").replace(".", "_")
        name = name if name.startswith("uniform") else f"b{name}"
        result[f"cache_kl_{name}_{r['model']}"] = r["divergence"]
    if own:
        result["cache_kl_b4"] = max(r["divergence"] for r in own if r["map"] == "4 bits")
    for dtype, suffix in (("float16", ""), ("float32", "_float32")):
        ratios = [r["exact_bytes"] / r["bytes"] for r in rounds if r.get("dtype") == dtype]
        if ratios:
            result[f"cache_memory_ratio_b4{suffix}"] = min(ratios)
    reads = [r["exact_bytes"] / (r["bytes"] + r["one_layer"]) for r in rounds if r.get("dtype") == "float16"]
    if reads:
        result["cache_memory_ratio_b4_while_read"] = min(reads)
    for bits in PEER_BITS:
        beside = [r for r in rounds if r.get("peer_bits") == bits]
        name = "cache_kl_over_transformers" if bits == 4 else f"cache_kl_over_transformers_b{bits}"
        for model in dict.fromkeys(r["model"] for r in beside):
            result[f"{name}_{model}"] = max(r["ratio"] for r in beside if r["model"] == model)
        if beside:
            result[name] = max(r["ratio"] for r in beside)
    for r in (r for r in rounds if "step_seconds" in r):
        ours, exact = (statistics.median(r["step_seconds"][name]) for name in ("ours", "exact"))
        result[f"cache_step_time_ratio_{r['model']}"] = ours / exact
    return result
