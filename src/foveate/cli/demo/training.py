"""The demo's own model: a byte-level Llama that learns Python from the standard library of the Python it runs in.

Nothing is downloaded. The recipe is made for minutes on two cores, so every choice serves the loss per second: short
steps, matrices updated by Muon (Jordan 2024, orthogonalised momentum) and the rest by AdamW, output projections that
start at zero, and a learning rate that falls linearly to zero. The schedule follows the steps on a fast machine and the
clock on a slow one, whichever is further, so training always ends in time, and always at a learning rate of zero.
Before it starts, a few steps are timed to choose the number of threads, and float32 or bfloat16 products.

Shapes: B windows a step, S bytes a window, V = 256 byte values; a stack of equal matrices is [L, N, K].
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.cli.demo.corpus import Corpus, windows
from foveate.cli.shared.models import transformers
from foveate.kernels.threads import threads

_VALUES = 256  # a byte is a token
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan 2024: the quintic that brings every singular value near 1


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is learnt; the cache is keyed by it.

    Attributes:
        width, hidden, layers, heads: the Llama's shape.
        window: bytes of one training window.
        batch: windows a step.
        steps: the length of training on a machine that is fast enough.
        seconds: the length of training on one that is not.
        muon_rate, adam_rate: greatest learning rates of matrices and of the rest.
        warm_up: share of training in which the rates rise.
        seed: of the weights and of the order of windows.
    """

    width: int = 128
    hidden: int = 384
    layers: int = 4
    heads: int = 4
    window: int = 256
    batch: int = 8
    steps: int = 1100
    seconds: float = 165.0
    muon_rate: float = 0.012
    adam_rate: float = 0.006
    warm_up: float = 0.03
    seed: int = 0


@dataclass(frozen=True)
class Progress:
    """Where training stands: `done` is the share of it that is over, `loss` a running mean in nats a byte."""

    step: int
    done: float
    loss: float
    elapsed: float

    @property
    def left(self) -> float:
        """Seconds that remain at this pace."""
        return self.elapsed * (1 - self.done) / max(self.done, 1e-6)


@dataclass(frozen=True, eq=False)
class Trained:
    """A model and how it came to be: from the cache or not, and the seconds, steps and bytes that training took."""

    model: nn.Module
    cached: bool
    seconds: float
    steps: int
    bytes_seen: int
    threads: int
    products: str


def new_model(recipe: Recipe) -> nn.Module:
    """An untrained Llama of the recipe's shape."""
    package = transformers()
    config = package.LlamaConfig(
        vocab_size=_VALUES,
        hidden_size=recipe.width,
        intermediate_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model: nn.Module = package.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(parameter)
    return model


def train(model: nn.Module, recipe: Recipe, text: Corpus, watch: Callable[[Progress], None]) -> Trained:
    """Train a model in place."""
    model.train()
    generator = torch.Generator().manual_seed(recipe.seed)
    pace = _quickest(model, windows(text.train, recipe.batch, recipe.window + 1, generator.clone_state()))
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and ".layers." in n]
    chosen = {id(p) for p in matrices}
    muon = _Muon(matrices, pace.products)
    adam = torch.optim.AdamW(
        [p for p in model.parameters() if id(p) not in chosen], betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    step, done, running, started = 0, 0.0, 0.0, time.monotonic()
    with threads(pace.threads):
        while done < 1:
            rate = min(1.0, (done + 1 / recipe.steps) / recipe.warm_up) * (1 - done)
            loss = _loss(model, windows(text.train, recipe.batch, recipe.window + 1, generator), pace.products)
            loss.backward()
            for group in adam.param_groups:
                group["lr"] = recipe.adam_rate * rate
            muon.step(recipe.muon_rate * rate)
            adam.step()
            model.zero_grad(set_to_none=True)
            step += 1
            running += (loss.item() - running) * max(0.03, 1 / step)
            elapsed = time.monotonic() - started
            done = min(1.0, max(step / recipe.steps, elapsed / recipe.seconds))
            watch(Progress(step, done, running, elapsed))
    products = str(pace.products).removeprefix("torch.")
    return Trained(
        model.eval(),
        False,
        time.monotonic() - started,
        step,
        step * recipe.batch * recipe.window,
        pace.threads,
        products,
    )


def _loss(model: nn.Module, bytes_BS: Tensor, products: torch.dtype) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=products is torch.bfloat16):
        logits_BSV = model(bytes_BS[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits_BSV.float().flatten(0, 1), bytes_BS[:, 1:].flatten())


class _Muon:
    """Momentum whose update is made orthogonal, for matrices; equal shapes go through the iteration as one stack."""

    def __init__(self, parameters: Sequence[nn.Parameter], products: torch.dtype) -> None:
        self._products = products
        self._stacks: dict[torch.Size, list[nn.Parameter]] = {}
        for p in parameters:
            self._stacks.setdefault(p.shape, []).append(p)
        self._momentum = {shape: torch.zeros(len(stack), *shape) for shape, stack in self._stacks.items()}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for shape, stack in self._stacks.items():
            gradient_LNK = torch.stack([p.grad for p in stack if p.grad is not None])
            momentum_LNK = self._momentum[shape].lerp_(gradient_LNK, 0.05)
            update_LNK = orthogonal(gradient_LNK.lerp_(momentum_LNK, 0.95).to(self._products)).float()
            torch._foreach_add_(
                list[Tensor](stack), update_LNK.unbind(), alpha=-rate * max(1.0, shape[0] / shape[1]) ** 0.5
            )


def orthogonal(g_LNK: Tensor) -> Tensor:
    """The nearest matrices with all singular values near 1 (0.7 to 1.2), by five Newton-Schulz steps."""
    tall = g_LNK.shape[-2] > g_LNK.shape[-1]
    x = g_LNK.mT if tall else g_LNK
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


@dataclass(frozen=True)
class _Pace:
    threads: int
    products: torch.dtype


def _quickest(model: nn.Module, bytes_BS: Tensor) -> _Pace:
    """Time forward and backward: bfloat16 products help where the processor has them and hurt elsewhere, and so do many
    threads on small matrices.
    """
    most = torch.get_num_threads()
    best, fastest = _Pace(most, torch.float32), float("inf")

    def consider(pace: _Pace) -> None:
        nonlocal best, fastest
        with threads(pace.threads):
            for _ in range(3):
                started = time.perf_counter()
                _loss(model, bytes_BS, pace.products).backward()
                took = time.perf_counter() - started
                if took < fastest:
                    best, fastest = pace, took
                elif took > 2 * fastest:
                    break
        model.zero_grad(set_to_none=True)

    for products in (torch.float32, torch.bfloat16):
        consider(_Pace(most, products))
    for count in sorted({1, min(2, most), min(4, most)} - {most}):
        consider(_Pace(count, best.products))
    return best
