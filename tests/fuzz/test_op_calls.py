"""A slice of the random calls of every op, with the plain kernels; `make fuzz` makes many more under sanitizers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from foveate.kernels.backends.table import ensure_loaded
from fuzz.op_calls import op_call, run
from kernels.cases import forced, isas

OPS = {
    "plane_linear", "plane_linear_no_grad", "plane_linear_by_handle", "plane_handle", "plane_unpack",
    "plane_linear_backward", "generation_book", "publish", "rows_of_passes", "begin_pass", "end_pass",
    "pass_levels", "pass_input", "pass_choice", "plane_error",
    "pass_rows", "pass_owners", "pass_generation", "plane_embedding",
    "error_feedback", "coordinate_descent", "search_grids", "group_pack", "group_unpack", "group_variance",
    "mask_pack", "two_values_pack", "mask_unpack", "narrow_pack", "narrow_unpack", "moments",
    "decoder_handle", "decoder_blocks", "decoder_blocks_packed", "decoder_blocks_paged", "row_sums", "input_changes",
    "add_squared_gradients",
    "plane_to_tiles", "half_extremes", "halves_to_planes", "upper_halves",
}  # fmt: skip


@pytest.mark.skipif(ensure_loaded().isa is None, reason="no compiled kernels")
def test_random_calls_are_answered_or_refused() -> None:
    answered: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for isa in isas():
        with forced(isa):
            for number in range(1000):
                call = op_call(2, number)
                (answered if run(call) else refused)[call.op] += 1
    assert set(answered) == set(answered | refused) == OPS
    assert min(answered.total(), refused.total()) > 250


def test_a_call_is_made_of_its_seed_and_number() -> None:
    assert [op_call(3, n).wrongs for n in range(30)] == [op_call(3, n).wrongs for n in range(30)]
    assert [op_call(3, n).wrongs for n in range(30)] != [op_call(4, n).wrongs for n in range(30)]


def test_every_op_of_the_kernels_is_called() -> None:
    schemas = (schema.name.split("::") for schema in torch._C._jit_get_all_schemas())
    ours = {name for space, name in schemas if space == "foveate" and not name.startswith("_")}
    assert ours - {"plane_experts"} == OPS  # that one is a module's, and in Python
