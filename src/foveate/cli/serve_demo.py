"""`foveate serve-demo`: a server gets more than it can carry, bends its precision, and comes back; in three minutes."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import foveate as fv
from foveate.cli.shared.console import emit
from foveate.cli.shared.models import load_planes, load_tokenizer, transformers
from foveate.cli.shared.options import Json

#: Seconds of calm, of load, and at most of coming back.
_CALM, _LOAD, _BACK = 6.0, 30.0, 100.0
_PLACES, _CLIENTS, _TOKENS = 4, 16, 24
_PROMPT = "def read_config(path, default=None):\n"


@dataclass(kw_only=True)
class Load:
    """Clients that ask again as soon as they are answered.

    Attributes:
        port: of the server.
        wanted: how many clients ask now; more threads wait.
        answers: what each answer said of its precision.
        lost: answers that did not come, or not whole.
    """

    port: int
    wanted: int = 0
    answers: list[dict[str, Any]] = field(default_factory=list)
    lost: int = 0
    ends: bool = False

    def run(self, number: int) -> None:
        """One client."""
        body = json.dumps({"prompt": _PROMPT, "max_tokens": _TOKENS, "temperature": 0.7})
        while not self.ends:
            if number >= self.wanted:
                time.sleep(0.05)
                continue
            connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
            try:
                connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
                reply = connection.getresponse()
                answer = json.loads(reply.read())
                whole = reply.status == 200 and answer["usage"]["completion_tokens"] > 0
                if whole:
                    self.answers.append(answer["precision"])
                self.lost += not whole
            except OSError:
                self.lost += 1
            finally:
                connection.close()


def serve_demo(
    out: Annotated[
        Path | None, typer.Argument(help="A folder with a language model. Default: the model that `demo` trains.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes a free one.")] = 8000,
    json_output: Json = False,
) -> None:
    """Serve a model, send it more than it can carry, and show how its precision bends and comes back."""
    from foveate.serve.extras import require_serving

    require_serving()
    from foveate.runtime import Limits
    from foveate.serve.options import ServeOptions, ServerLimits
    from foveate.serve.run import in_background, made_engine

    console = Console(stderr=json_output, highlight=False)
    model, tokenizer, name = _demo_model(console) if out is None else _given(out)
    options = ServeOptions(
        name=name,
        bend=Limits(queue_wait=0.3),
        limits=ServerLimits(batch=_PLACES, batch_tokens=64, cache_tokens=2048),
        drain_seconds=10.0,
    )
    engine = made_engine(model, tokenizer, options)
    last = len(engine.control.frontier) - 1
    console.print(
        f"[bold]{name}[/]: {last + 1} maps from {engine.control.bits[0]:.2f} to {engine.control.bits[-1]:.2f} bits a "
        f"weight, {_PLACES} places, and the first in the queue may wait 0.3 s."
    )
    with in_background(engine, port=port) as taken:
        console.print(f"Look at [bold]http://127.0.0.1:{taken}/[/] meanwhile.\n")
        load = Load(port=taken)
        for number in range(_CLIENTS):
            threading.Thread(target=load.run, args=(number,), daemon=True).start()
        figures = _story(console, engine, load)
    if json_output:
        print(emit(figures))


def _story(console: Console, engine: Any, load: Load) -> dict[str, Any]:
    control, began, worst, came_back = engine.control, time.monotonic(), 0, None
    console.print(f"{_CALM:.0f} s with one client, {_LOAD:.0f} s with {_CLIENTS}, and then one again:")
    while True:
        passed = time.monotonic() - began
        load.wanted = _CLIENTS if _CALM <= passed < _CALM + _LOAD else 1
        running, waiting, _ = engine.jobs.counts()
        worst = max(worst, control.index)
        bits_now = control.bits[control.index]
        console.print(
            f"{passed:5.0f} s  {load.wanted:2d} clients  {running:2d} computed  {waiting:2d} wait  "
            f"index {control.index:2d}  {bits_now:5.2f} bits  {'#' * round(2 * bits_now)}"
        )
        if passed > _CALM + _LOAD and control.index == 0:
            came_back = passed - _CALM - _LOAD
            break
        if passed > _CALM + _LOAD + _BACK:
            break
        time.sleep(1.0)
    load.ends = True
    bits = [answer["bits"] for answer in load.answers]
    figures = {
        "answers": len(bits),
        "lost": load.lost,
        "worst_index": worst,
        "bits_mean": sum(bits) / max(len(bits), 1),
        "bits_least": min(bits, default=None),
        "switches": sum(control.switches.values()),
        "seconds_to_come_back": came_back,
    }
    back = (
        "it did not come back in time"
        if came_back is None
        else f"{came_back:.0f} s after the load it was back at index 0"
    )
    console.print(
        f"\n{len(bits)} answers, {load.lost} lost. Precision went down to index {worst}, "
        f"{control.bits[worst]:.2f} bits; {back}."
    )
    console.print("What the manager decided:")
    for one in list(control.decisions)[-12:]:
        console.print(f"  index {one.before} -> {one.index}: {one.reason}", style="dim")
    return figures


def _given(out: Path) -> tuple[Any, Any, str]:
    return load_planes(out), load_tokenizer(str(out), "copy the original model's tokenizer files into it"), out.name


def _demo_model(console: Console) -> tuple[Any, Any, str]:
    """The model of `foveate demo`, quantized, with a tokenizer whose tokens are bytes."""
    import torch

    from foveate.cli.demo.cache import default_cache, trained
    from foveate.cli.demo.corpus import corpus, windows
    from foveate.cli.demo.training import Recipe

    recipe, text = Recipe(), corpus()
    console.print("The demo's model: from the cache of `foveate demo`, or trained now, which takes three minutes.")
    made = trained(recipe, text, default_cache(), watch=lambda _: None, notice=console.print)
    chosen = windows(text.train, 16, recipe.window, torch.Generator().manual_seed(1))
    fv.quantize(made.model, [{"input_ids": part} for part in chosen.split(8)], progress=False)
    return made.model, byte_tokenizer(), "demo"


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are bytes, each with the byte's own value."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    package = transformers()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # printable bytes stand for themselves; the others, in order, for the letters from 256 on
    plain = {letter: ord(letter) for letter in letters if ord(letter) < 256}
    others = [value for value in range(256) if value not in plain.values()]
    vocabulary = plain | dict(zip([letter for letter in letters if ord(letter) >= 256], others, strict=True))
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return package.PreTrainedTokenizerFast(tokenizer_object=made)
