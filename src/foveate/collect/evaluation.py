"""Evaluation mode while something is measured; afterwards every module has its own mode again, also after errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put all modules into evaluation mode while this is open, and each back into its own mode afterwards."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, frozen parameters and no KV cache while this is open; all of it is put back afterwards."""
    wanted = {p: p.requires_grad for p in model.parameters()}
    all_configs = (getattr(m, "config", None) for m in model.modules())
    configs: dict[int, Any] = {id(c): c for c in all_configs if getattr(c, "use_cache", None) is True}
    with evaluating(model):
        try:
            model.requires_grad_(False)
            for config in configs.values():
                config.use_cache = False
            yield
        finally:
            for config in configs.values():
                config.use_cache = True
            for parameter, flag in wanted.items():
                parameter.requires_grad_(flag)
