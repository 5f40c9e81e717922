"""An attention layer whose projections form a fused group, and a counter of calls of the op."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tiny import generator


class Attention(nn.Module):
    """Three layers of one input, or of two, and one of its own."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = nn.Linear(64, 48, bias=bias)
        self.k_proj = nn.Linear(64, 16, bias=bias)
        self.v_proj = nn.Linear(64, 16, bias=bias)
        self.o_proj = nn.Linear(48, 64)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        other = x if other is None else other
        scale = self.k_proj(other).sum(-1, keepdim=True) + self.v_proj(other).mean(-1, keepdim=True)
        return self.o_proj(torch.tanh(self.q_proj(x) * scale))


def within(model: nn.Module, body: Callable[[Tensor], Any], x: Tensor) -> Any:
    """What `body(x)` gives when it is what a call of the model does."""
    model.forward = lambda x: body(x)  # a layer would become a child
    try:
        return model(x)
    finally:
        del model.forward


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func.name())] += 1
        return func(*args, **(kwargs or {}))

    def products(self) -> int:
        return sum(n for name, n in self.calls.items() if name.startswith("foveate::plane_linear"))


X = torch.randn(5, 64, generator=generator(0))


def apart(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "fused_group"):
            module.fused_group = None
    return model
