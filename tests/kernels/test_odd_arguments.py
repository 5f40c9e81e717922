"""Arguments that no model gives: sizes that no machine has, and tensors that torch would negate."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from foveate.errors import FoveateError
from foveate.kernels.backends import table as dispatch

dispatch.ensure_loaded()


def test_ops_that_write_refuse_what_is_negated_lazily() -> None:
    """torch would negate a copy, look for it among what the op returns, and end the process."""
    written = torch._neg_view(torch.zeros(0, dtype=torch.uint8))
    with pytest.raises(FoveateError, match="plane_to_tiles writes into an argument"):
        torch.ops.foveate.plane_to_tiles(torch.zeros(16, 0, dtype=torch.uint8), 3, 128, written)
    with pytest.raises(FoveateError, match="resolve_neg"):
        torch.ops.foveate.add_squared_gradients(
            torch.zeros(2, 2), torch._neg_view(torch.zeros(1, 2)), torch.zeros(1, 2)
        )


def test_sizes_that_no_machine_has_are_refused() -> None:
    ops, one = torch.ops.foveate, torch.ones(1, 1)
    empty = torch.empty(0, 2**62, dtype=torch.uint8)
    with pytest.raises((RuntimeError, FoveateError)):
        ops.plane_to_tiles(empty, 0, 128, torch.empty(0, dtype=torch.uint8))
    with pytest.raises((RuntimeError, FoveateError)):
        ops.row_sums(one.expand(2**50, 1))
    with pytest.raises((RuntimeError, FoveateError)):
        ops.input_changes(one.expand(1, 2**50), one.expand(1, 2**50))
    with FakeTensorMode(), pytest.raises(FoveateError, match="group"):
        ops.half_extremes(torch.ones(16, 32, dtype=torch.float16), 0)


def test_a_weight_that_is_not_there_is_not_read() -> None:
    level, strips = torch.tensor([16], dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
    with pytest.raises((RuntimeError, FoveateError, ValueError, IndexError)):
        torch.ops.foveate.plane_error(torch.ones(2, 32), [], [], level, None, [0, 1], strips, torch.zeros(0))
