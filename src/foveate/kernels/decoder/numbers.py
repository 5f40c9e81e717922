"""The numbers and kinds that say what a decoder's blocks compute, as `decoder_handle` takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

#: The groups of weights of a block that share an input, and how many weights each may have: q, k and v, or one that is
#: all three; the output of attention; gate and up, or one that is both; down.
GROUPS = (3, 1, 2, 1)
#: The op takes so many rows at once through all blocks. A call with more needs a cache of its own for each block.
ROWS_AT_ONCE = 512
#: The norms of a block: of its input, of queries, of keys, of attention's output, of the MLP's input and of its output.
NORMS = 6
#: The kinds of a norm: none, x * weight and x * (1 + weight), of an x whose mean square is 1.
NO_NORM, RMS_NORM, RMS_NORM_ONE_PLUS = range(3)
#: Activations, by number.
ACTIVATIONS: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    ("silu", F.silu),
    ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    ("gelu", F.gelu),
    ("relu", F.relu),
)


@dataclass(frozen=True)
class Numbers:
    """The numbers of a block, in the order in which `decoder_handle` takes them.

    Attributes:
        heads, kv_heads, head_size: of queries, and of keys and values.
        rotary_size: how much of a head is turned; 0 for no rotary positions.
        rotary_table: which table of angles.
        window: positions that a query sees, itself among them; 0 for all.
        whole_norms: 1 if queries and keys are normed whole, 0 if head by head.
        activation: a number of `ACTIVATIONS`.
        experts: how many there are in a mixture; 0 for one MLP.
        top_k: how many of them a row takes.
        normalized: 1 if the weights of a row's experts add up to 1, 0 if they are shares among all experts.
    """

    heads: int
    kv_heads: int
    head_size: int
    rotary_size: int
    rotary_table: int
    window: int
    whole_norms: int
    activation: int
    experts: int = 0
    top_k: int = 0
    normalized: int = 0


@dataclass(frozen=True)
class Constants:
    """The constants of a block, in the order in which `decoder_handle` takes them.

    Attributes:
        scale: of scores.
        cap: scores are cap * tanh(score / cap); 0 for scores as they are.
        residual: what outputs are multiplied by before they are added.
    """

    scale: float
    cap: float
    residual: float
