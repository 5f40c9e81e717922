"""Tiny weights and models that the tests are made of, and a dense weight computed without foveate's own code."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import foveate as fv
from foveate.planes import PlaneTensor, exact_tiles, from_codes
from foveate.rounding import Rounded

LEVELS = (0, 2, 3, 4, 6, 8)


@dataclass
class Coded:
    """A weight on planes beside the codes it was made from."""

    planes: PlaneTensor
    anchor: Tensor
    residual: Tensor
    scale: Tensor
    offset: Tensor
    gain: Tensor

    def dense(self, level_tiles: Tensor) -> Tensor:
        """docs/format.md, "Values", in float64: [N, K] at the given level of each tile [NT, G]."""
        p = self.planes
        q0, q1, q2 = self.anchor >> 2, self.anchor >> 1 & 1, self.anchor & 1
        q3, q4 = self.residual >> 2, self.residual & 3
        four = (q0 << 2 | q1 << 1 | q2).double()
        rows, columns = torch.arange(p.rows), torch.arange(p.columns)
        level_NK = level_tiles[rows // 16][:, columns // p.group]
        scale = self.scale.double()[:, columns // p.group]
        offset = self.offset.double()[:, columns // p.group]
        each = (16, 8, 4, 12)[p.reach]
        code = {
            2: (q0.double(), 3, 4.0),
            3: ((q0 << 1 | q1).double(), 7, 2.0),
            4: (four, 15, 1.0),
            6: (each // 4 * four + q3, 15 * (each // 4) + 3, 4 / each),
            8: (each * four + (q3 << 2 | q4), 15 * each + 15, 1 / each),
        }
        out = torch.zeros(p.rows, p.columns, dtype=torch.float64)
        for i, (level, (c, top, step)) in enumerate(code.items()):
            # from 4 bits on there is no gain
            gain = self.gain[i].double().expand(p.rows)[:, None] if level < 4 else 1.0
            out = torch.where(level_NK == level, offset + scale * gain * step * (c - top / 2), out)
        return out


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coded(rows: int, columns: int, *, group: int = 32, reach: int = 0, row_gains: bool = False, seed: int = 0) -> Coded:
    """A weight of random codes, scales, offsets and gains."""
    g = generator(seed)
    groups = -(-columns // group)
    anchor = torch.randint(0, 16, (rows, columns), generator=g, dtype=torch.uint8)
    residual = torch.randint(0, 16, (rows, columns), generator=g, dtype=torch.uint8)
    # docs/format.md: 2^E (1 + M/16), and whole eighths of it; all within the 15 powers of two below the largest
    power = torch.randint(-10, -5, (rows, groups), generator=g)
    scale = torch.exp2(power.float()) * (1 + torch.randint(0, 16, (rows, groups), generator=g) / 16)
    offset = torch.randint(-128, 128, (rows, groups), generator=g) * scale / 8
    gain = (1 + 0.05 * torch.randn(2, rows if row_gains else 1, generator=g)).half()
    planes = from_codes(anchor, residual, scale, offset, gain, group=group, reach=reach)
    return Coded(planes, anchor, residual, scale, offset, gain)


def with_exact(planes: PlaneTensor, share: float, dtype: torch.dtype, seed: int = 0) -> PlaneTensor:
    """The weight with about a share of its tiles exact too, of random values."""
    tiles = (torch.rand(planes.stored_levels.numel(), generator=generator(seed)) < share).nonzero()[:, 0]
    values = torch.randn(planes.rows, planes.columns, generator=generator(seed + 1))
    return replace(planes, exact=exact_tiles(values, tiles, planes.group, dtype))


def read_at(rounded: Rounded, level: int) -> Tensor:
    """The dense weight of rounded codes at a level."""
    r = rounded
    planes = from_codes(r.anchor, r.residual, r.scale, r.offset, r.gain, group=r.group, reach=r.reach)
    planes.active_levels.fill_(level)
    return planes.dequantize()


def random_levels(planes: PlaneTensor, seed: int, levels: Sequence[int] = LEVELS) -> Tensor:
    """A level for each tile, uint8 [NT, G]."""
    table = torch.tensor(levels, dtype=torch.uint8)
    return table[torch.randint(0, len(levels), planes.grid, generator=generator(seed))]


def mlp(sizes: Sequence[int] = (70, 40, 24, 10), seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def rows(count: int = 64, columns: int = 70, batches: int = 2, seed: int = 1) -> list[Tensor]:
    return list(torch.randn(count, columns, generator=generator(seed)).chunk(batches))


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all tensors of a model, and of the levels in its newest generation."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers()) if t.numel()}
    levels = sum(s.tiles for s in fv.current_map(model).weight_sites())
    return levels + sum(t.numel() * t.element_size() for t in tensors.values())


def quantized_mlp(**keywords: Any) -> tuple[nn.Sequential, fv.Profile]:
    model = mlp()
    profile = fv.quantize(model, rows(), objective=fv.Logits(), progress=False, **keywords)
    return model, profile


#: The sizes of a tiny transformer, as configurations of transformers take them.
TRANSFORMER: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama_config(**changes: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**{**TRANSFORMER, **changes})


def llama(seed: int = 0, **changes: Any) -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(**changes)).eval()


def tokens(count: int = 4, length: int = 12, batches: int = 2, vocabulary: int = 50, seed: int = 1) -> list[Any]:
    ids = torch.randint(3, vocabulary, (count, length), generator=generator(seed))
    return [{"input_ids": part} for part in ids.chunk(batches)]


def quick_tracking(**changes: Any) -> Any:
    """Options of following importance in streams of a few tokens: every pass is observed, and forgotten soon."""
    from foveate.importance import Decay, TrackingOptions

    known: dict[str, Any] = {"decay": Decay(keep=0.5, tokens=64), "observe_every": 1, "most_time": None}
    return TrackingOptions(**{**known, "decide_every": 64, **changes})


def quantized_llama(**changes: Any) -> tuple[Any, fv.Profile]:
    model = llama(**changes)
    return model, fv.quantize(model, tokens(), progress=False)
