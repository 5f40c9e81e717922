"""Tiny decoders of transformers with random weights on planes, of each family that is fused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate as fv
from foveate.bench.shared.random_model import on_random_planes
from foveate.nn.decoder.fused import FusedForward
from tiny import generator

transformers = pytest.importorskip("transformers")

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 6},
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
    "Gemma": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6},
    "Gemma3": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6, "num_hidden_layers": 7},
    "Phi3": {"sliding_window": None},
    "Olmo2": {},
    "SmolLM3": {"num_hidden_layers": 4},
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "norm_topk_prob": True},
    "Granite": {"residual_multiplier": 0.5, "attention_multiplier": 0.2},
}


def model_of(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    config_class = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
    model_class = getattr(transformers, f"{family}ForCausalLM", None)
    if model_class is None:
        pytest.skip(f"this release of transformers has no {family}")
    with torch.device("meta"):
        model = model_class(config_class(**{**COMMON, **FAMILIES.get(family, {}), **changes}))
    on_random_planes(model)
    # what is no weight on planes: norms and biases at random, and the angles, which the meta device left out
    g = generator(0)
    for name, parameter in model.named_parameters():
        parameter.data = (torch.ones_like(parameter) + 0.2 * torch.randn(parameter.shape, generator=g)).to(parameter)
        if "bias" in name:
            parameter.data -= 1
    base = model.base_model
    base.rotary_emb = type(base.rotary_emb)(base.config)
    scale = getattr(base.embed_tokens, "embed_scale", None)
    if isinstance(scale, Tensor):
        scale.fill_(float(base.config.hidden_size) ** 0.5)
    model.to(dtype)
    model.generation_config.eos_token_id = None
    fv.unfuse(model)
    fv.fuse(model)
    return model


def forward_of(model: nn.Module) -> FusedForward:
    found: Any = model.base_model.__dict__["forward"]
    assert isinstance(found, FusedForward)
    return found


def same(fused: Tensor, plain: Tensor, error: float = 0.01) -> bool:
    """An input of 8 bits turns a difference of rounding into one of a step now and then."""
    return float((fused.float() - plain.float()).norm()) <= error * float(plain.float().norm())
