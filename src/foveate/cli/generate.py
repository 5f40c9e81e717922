"""`foveate generate`: text from a model on planes, at one precision or at one that changes between tokens."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, cast

import torch
import typer
from torch import Tensor, nn

import foveate as fv
from foveate.cli.shared import options
from foveate.cli.shared.console import emit, log
from foveate.cli.shared.models import config_of, is_causal, load_planes, load_tokenizer
from foveate.errors import BudgetError, DataError, LevelError
from foveate.nn.foreign.cache_argument import cache_argument, cache_of
from foveate.precision.maps import uniform


@dataclass(frozen=True)
class Switch:
    """A change of precision: the index of the next token, the new level, and the microseconds of the change."""

    at: int
    level: int
    microseconds: float


def generate(
    out: options.Folder,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens to write.")] = 64,
    level: Annotated[int | None, typer.Option(help="Load and read every weight at this level.")] = None,
    bits: options.Bits = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Temperature of sampling; 0 takes the likeliest.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    schedule: Annotated[str | None, typer.Option(help="Levels to use in turn, such as 8,4,2.")] = None,
    every: Annotated[int, typer.Option(min=1, help="Tokens written at each level of the schedule.")] = 16,
    limits: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=VALUE,...",
            help="Lower the precision while a limit is exceeded, such as latency=50ms,power=45W,quality=0.02.",
        ),
    ] = None,
    cache_bits: Annotated[
        int | None, typer.Option(help="Pack all but recent keys and values at 2, 4, 8 or 16 bits. Default: exact.")
    ] = None,
    memory: options.Limit = None,
    json_output: options.Json = False,
) -> None:
    """Continue a prompt. Without --level, --bits or --schedule the model is read by the folder's default map, or with
    --memory by the best that fits.
    """
    head = fv.read_head(out)
    if sum(choice is not None for choice in (level, bits, schedule)) > 1:
        raise LevelError("give at most one of --level, --bits and --schedule")
    kept = _limits_of(limits, schedule)
    config = config_of(str(out))
    if not is_causal(config):
        raise DataError(f"{out} holds no model that predicts the next token")
    cache = None if cache_bits is None else fv.quantized_cache(config, cache_bits)
    levels = [] if schedule is None else options.levels_of(schedule)
    keep: fv.PrecisionMap | int | None = head.plan
    if level is not None:
        keep = options.level_of(str(level))
    elif bits is not None:
        keep = fv.allocate(fv.load_profile(out), fv.Budget(bits=bits))
    elif levels:
        keep = max(levels)
    tokenizer = load_tokenizer(str(out), "copy the original model's tokenizer files into it")
    given = tokenizer(prompt, return_tensors="pt")["input_ids"]
    most = getattr(config, "max_position_embeddings", None)
    if not given.shape[1] or (isinstance(most, int) and given.shape[1] >= most):
        raise DataError(f"the prompt has {given.shape[1]} tokens, and the model takes 1 to {(most or 0) - 1}")
    if isinstance(most, int) and given.shape[1] + max_tokens > most:
        max_tokens = most - given.shape[1]
        log.info("the model has %d positions: writing %d tokens at most", most, max_tokens)
    chosen = level is not None or bits is not None
    model = load_planes(out, None if memory is not None else keep, memory)
    if memory is not None and chosen:
        fv.apply(model, keep if isinstance(keep, fv.PrecisionMap) else _uniform(model, cast(int, keep)))
    switches: list[Switch] = []
    manager = None if kept is None else fv.RuntimeManager(model, limits=kept)
    moves: list[dict[str, Any]] = []

    def before(index: int) -> None:
        if manager is not None:
            _note_moves(manager, index, moves, json_output)
        if levels and index % every == 0:
            switched = _switch(model, levels[index // every % len(levels)], index)
            switches.append(switched)
            if not json_output:
                sys.stdout.flush()
                print(f"[{switched.level} bits, {switched.microseconds:.0f} us]", end="", file=sys.stderr, flush=True)

    started = time.perf_counter()
    ids: list[int] = []
    text = ""
    if not json_output:
        print(prompt, end="", flush=True)
    with manager or nullcontext():
        for piece in _pieces(
            tokenizer, _sampled(model, given, cache, max_tokens, temperature, seed, _ends(model), before), ids
        ):
            text += piece
            if not json_output:
                print(piece, end="", flush=True)
        bits_now = fv.current_map(model).bits
    seconds = time.perf_counter() - started
    if not json_output:
        print()
        log.info("%d tokens, %.1f a second", len(ids), len(ids) / max(seconds, 1e-9))
        if memory is not None:
            log.info("%s", fv.memory_report(model))
        return
    result: dict[str, Any] = {
        "prompt": prompt,
        "text": text,
        "tokens": ids,
        "bits": bits_now,
        "seconds": seconds,
        "switches": [{"at": s.at, "level": s.level, "us": s.microseconds} for s in switches],
    }
    if manager is not None:
        result["moves"] = moves
        result["expected_kl"] = manager.expected_kl
    if cache is not None:
        result["cache_bytes"] = cache.nbytes
    if memory is not None:
        result["memory"] = asdict(fv.memory_report(model))
    print(emit(result))


def _limits_of(text: str | None, schedule: str | None) -> fv.Limits | None:
    """The limits that the option gives; raises `BudgetError` for limits that a single text cannot keep to."""
    if text is None:
        return None
    if schedule is not None:
        raise LevelError("give at most one of --limits and --schedule")
    limits = fv.Limits.parse(text)
    if limits.queue_wait is not None:
        raise BudgetError("a limit of queue_wait is for a server: foveate generate has no queue")
    return limits


def _note_moves(manager: fv.RuntimeManager, token: int, moves: list[dict[str, Any]], silent: bool) -> None:
    """Note the moves of the manager since the last token, and print them on stderr."""
    for move in list(manager.moves)[len(moves) :]:
        decided = move.decision
        moves.append({"at": token, "before": decided.before, "index": decided.index, "reason": decided.reason})
        if not silent:
            bits = manager.frontier[decided.index].bits
            sys.stdout.flush()
            print(f"[index {decided.index}, {bits:.2f} bits: {decided.reason}]", end="", file=sys.stderr, flush=True)


def _uniform(model: nn.Module, level: int) -> fv.PrecisionMap:
    current = fv.current_map(model)
    return replace(uniform(current.sites, level, current.other_bytes), other_parameters=current.other_parameters)


def _switch(model: nn.Module, level: int, index: int) -> Switch:
    plan = _uniform(model, level)
    started = time.perf_counter()
    fv.apply(model, plan)
    return Switch(index, level, 1e6 * (time.perf_counter() - started))


def _ends(model: nn.Module) -> frozenset[int]:
    """The ids of the tokens that end a text."""
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        end = getattr(holder, "eos_token_id", None)
        if end is not None:
            return frozenset([end] if isinstance(end, int) else end)
    return frozenset()


def _sampled(
    model: nn.Module,
    given_1S: Tensor,
    cache: Any,
    count: int,
    temperature: float,
    seed: int,
    ends: frozenset[int],
    before: Callable[[int], None],
) -> Iterator[int]:
    """Yield one sampled token after another; `before(index)` is called before each is computed. A cache of None is one
    of the model's own.
    """
    generator = torch.Generator().manual_seed(seed)
    # a prompt's logits are large
    only_last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        for index in range(count):
            before(index)
            output = model(input_ids=given_1S, **cache_argument(model, cache), use_cache=True, **only_last)
            cache = cache_of(output)
            logits_V = output.logits[0, -1].float()
            if temperature > 0:
                token = int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator))
            else:
                token = int(logits_V.argmax())
            if token in ends:
                return
            yield token
            given_1S = torch.tensor([[token]])


def _pieces(tokenizer: Any, sampled: Iterator[int], ids: list[int]) -> Iterator[str]:
    """Yield what each token adds to the text, in whole characters. The tokens are appended to `ids`."""
    said = ""
    for token in sampled:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(said) :]
            said = text
    yield tokenizer.decode(ids)[len(said) :]
