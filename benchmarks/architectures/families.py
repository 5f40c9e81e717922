"""The families of models that are tried: how to make a tiny model of each, and a batch of its inputs.

Configurations are transformers' own, with a width of 32 and two layers. A family that the installed transformers does
not have, or whose configuration differs there, is reported as not tried.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.bench.shared.extras import require

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_PICTURES: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_channels": 3, "num_labels": 7}
_MIXTURE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SOUND: dict[str, Any] = {
    "conv_dim": (32, 32),
    "conv_kernel": (8, 4),
    "conv_stride": (4, 4),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models.

    Attributes:
        name: its name in the table.
        kind: its section of the table.
        make: makes a model of random weights.
        batch: seed -> a batch, as `foveate.quantize` takes it.
        generates: whether it writes text.
        skeleton: whether loading needs a module to fill, as for all models that are not transformers'.
    """

    name: str
    kind: str
    make: Callable[[], torch.nn.Module]
    batch: Callable[[int], Any]
    generates: bool = False
    skeleton: bool = False


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(seed: int) -> dict[str, Tensor]:
    """Four lines of 12 tokens."""
    return {"input_ids": torch.randint(3, 96, (4, 12), generator=_random(seed))}


def _pairs(seed: int) -> dict[str, Tensor]:
    return {**tokens(seed), "decoder_input_ids": torch.randint(3, 96, (4, 6), generator=_random(seed + 100))}


def _pictures(seed: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(4, 3, 32, 32, generator=_random(seed))}


def _captions(seed: int) -> dict[str, Tensor]:
    return {**tokens(seed), **_pictures(seed)}


def _waves(seed: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(4, 800, generator=_random(seed))}


def _spectra(seed: int) -> dict[str, Tensor]:
    return {
        "input_features": torch.randn(4, 8, 64, generator=_random(seed)),
        "decoder_input_ids": tokens(seed)["input_ids"],
    }


def _sizes(settings: dict[str, Any]) -> dict[str, Any]:
    """The common sizes, updated with those of a family. None removes a size that the configuration computes itself."""
    return {key: value for key, value in {**_SIZES, **settings}.items() if value is not None}


def _made(config: str, model: str, settings: dict[str, Any]) -> Any:
    transformers = require("transformers")
    return getattr(transformers, model)(getattr(transformers, config)(**settings))


def _family(
    kind: str, name: str, config: str, model: str, batch: Callable[[int], Any], settings: dict[str, Any]
) -> Family:
    return Family(
        name=name,
        kind=kind,
        make=lambda: _made(f"{config}Config", model, settings),
        batch=batch,
        generates=model.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")),
    )


def _writer(name: str, prefix: str, *, config: str = "", model: str = "", **settings: Any) -> Family:
    made = model or f"{prefix}ForCausalLM"
    return _family("Decoders", name, config or prefix, made, tokens, _sizes(settings))


def _mixture(name: str, prefix: str, *, config: str = "", **settings: Any) -> Family:
    sizes = _sizes({"num_experts_per_tok": 2, "moe_intermediate_size": 32, **settings})
    return _family("Mixtures of experts", name, config or prefix, f"{prefix}ForCausalLM", tokens, sizes)


def _encoder(name: str, prefix: str, head: str = "ForMaskedLM", **settings: Any) -> Family:
    return _family("Encoders", name, prefix, f"{prefix}{head}", tokens, _sizes(settings))


def _pair(name: str, prefix: str, batch: Callable[[int], Any], **settings: Any) -> Family:
    model = f"{prefix}ForConditionalGeneration"
    return _family("Encoder-decoders", name, prefix, model, batch, _sizes(settings))


def _pictured(name: str, prefix: str, head: str = "ForImageClassification", **settings: Any) -> Family:
    return _family("Pictures and sound", name, prefix, f"{prefix}{head}", _pictures, _sizes({**_PICTURES, **settings}))


def _heard(name: str, prefix: str, **settings: Any) -> Family:
    return _family("Pictures and sound", name, prefix, f"{prefix}ForCTC", _waves, _sizes({**_SOUND, **settings}))


_PAIR_SIZES: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 2,
}
_T5_SIZES: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_STAGES: dict[str, Any] = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}

_TEXT_AND_PICTURES: dict[str, Any] = {
    "text_config": {**_SIZES, "num_key_value_heads": 4},
    "vision_config": {**_SIZES, **_PICTURES, "num_key_value_heads": 4},
}

TRANSFORMERS: tuple[Family, ...] = (
    _writer("Llama", "Llama"),
    _writer("Mistral", "Mistral"),
    _writer("Qwen2", "Qwen2"),
    _writer("Qwen3", "Qwen3"),
    _writer("Gemma", "Gemma"),
    _writer("Gemma 2", "Gemma2"),
    _writer("Gemma 3", "Gemma3", config="Gemma3Text"),
    _writer("Phi", "Phi"),
    _writer("Phi-3", "Phi3"),
    _writer("OLMo 2", "Olmo2"),
    _writer("Cohere", "Cohere"),
    _writer("Cohere 2", "Cohere2"),
    _writer("StableLM", "StableLm"),
    _writer("Granite", "Granite"),
    _writer("SmolLM 3", "SmolLM3"),
    _writer("Starcoder 2", "Starcoder2"),
    _writer("GLM 4", "Glm4"),
    _writer("Nemotron", "Nemotron"),
    _writer("GPT-2", "GPT2", model="GPT2LMHeadModel"),
    _writer("GPT-Neo", "GPTNeo", attention_types=[[["global", "local"], 1]], num_layers=2, num_heads=4),
    _writer("GPT-J", "GPTJ", rotary_dim=4),
    _writer("GPT-NeoX", "GPTNeoX"),
    _writer("GPT-BigCode", "GPTBigCode"),
    _writer("OPT", "OPT", ffn_dim=64, word_embed_proj_dim=32),
    _writer("BLOOM", "Bloom", n_head=4, n_layer=2),
    _writer("Falcon", "Falcon", head_dim=None),
    _writer("MPT", "Mpt", d_model=32, n_heads=4, n_layers=2),
    _writer("CodeGen", "CodeGen", rotary_dim=4),
    _writer("Mamba", "Mamba", state_size=8),
    _writer("Mamba 2", "Mamba2", state_size=8, num_heads=8, head_dim=8, n_groups=2),
    _writer("RecurrentGemma", "RecurrentGemma", lru_width=32, attention_window_size=16, num_hidden_layers=3),
    _writer("RWKV", "Rwkv", attention_hidden_size=32),
    _writer("LFM2", "Lfm2"),
    _mixture("Mixtral", "Mixtral", num_local_experts=4),
    _mixture("Qwen2-MoE", "Qwen2Moe", num_experts=4, shared_expert_intermediate_size=32),
    _mixture("Qwen3-MoE", "Qwen3Moe", num_experts=4),
    _mixture("OLMoE", "Olmoe", num_experts=4),
    _mixture("GPT-OSS", "GptOss", num_local_experts=4, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    _mixture("DeepSeek-V3", "DeepseekV3", **_LATENT),
    _mixture("GLM 4 MoE", "Glm4Moe", n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1),
    _mixture("Granite MoE", "GraniteMoe", num_local_experts=4),
    _mixture("Phi-3.5 MoE", "Phimoe", num_local_experts=4),
    _mixture(
        "Llama 4", "Llama4", config="Llama4Text", num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=64
    ),
    _mixture(
        "DBRX",
        "Dbrx",
        d_model=32,
        n_heads=4,
        n_layers=2,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}},
    ),
    _encoder("BERT", "Bert"),
    _encoder("RoBERTa", "Roberta"),
    _encoder("DistilBERT", "DistilBert", dim=32, hidden_dim=64, n_layers=2, n_heads=4),
    _encoder("ALBERT", "Albert", embedding_size=16),
    _encoder("ELECTRA", "Electra", embedding_size=16),
    _encoder("DeBERTa", "Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    _encoder("DeBERTa-v2", "DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    _encoder("ModernBERT", "ModernBert"),
    _encoder("MPNet", "MPNet"),
    _encoder("ESM", "Esm", mask_token_id=4, position_embedding_type="rotary"),
    _encoder("XLM-R, classification", "XLMRoberta", "ForSequenceClassification"),
    _encoder("FNet", "FNet"),
    _pair("T5", "T5", _pairs, **_T5_SIZES),
    _pair("T5 1.1 (gated)", "T5", _pairs, **_T5_SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    _pair("BART", "Bart", _pairs, **_PAIR_SIZES),
    _pair("Pegasus", "Pegasus", _pairs, **_PAIR_SIZES),
    _pair("M2M-100", "M2M100", _pairs, **_PAIR_SIZES),
    _pair(
        "Whisper",
        "Whisper",
        _spectra,
        **_PAIR_SIZES,
        num_mel_bins=8,
        max_source_positions=32,
        max_target_positions=64,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    ),
    _pictured("ViT", "ViT"),
    _pictured("DeiT", "DeiT"),
    _pictured("BEiT", "Beit"),
    _pictured("DINOv2", "Dinov2"),
    _pictured("ResNet", "ResNet", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"),
    _pictured("ConvNeXt", "ConvNext", **_STAGES, patch_size=4),
    _pictured("ConvNeXt v2", "ConvNextV2", **_STAGES, patch_size=4),
    _pictured(
        "Swin",
        "Swin",
        num_attention_heads=None,
        head_dim=None,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 4],
        window_size=2,
        patch_size=4,
    ),
    _pictured("MobileNet v2", "MobileNetV2", depth_multiplier=0.25),
    _pictured(
        "SegFormer",
        "Segformer",
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        decoder_hidden_size=32,
    ),
    _family("Pictures and sound", "CLIP", "CLIP", "CLIPModel", _captions, {**_TEXT_AND_PICTURES, "projection_dim": 32}),
    _family("Pictures and sound", "SigLIP", "Siglip", "SiglipModel", _captions, _TEXT_AND_PICTURES),
    _heard("Wav2Vec2", "Wav2Vec2"),
    _heard("HuBERT", "Hubert"),
)
