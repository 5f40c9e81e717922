"""The compiled kernels against the reference, and against themselves: one result, whatever computes it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.errors import FoveateError
from foveate.formats.levels import PLANES
from foveate.kernels.planes import reference
from foveate.planes import linear
from kernels.cases import COLUMNS, KNOWN_ISAS, ROWS, Call, calls, forced, isas, pairs, simple
from tiny import coded, generator, random_levels, with_exact

ISAS = isas()
pytestmark = pytest.mark.skipif(not ISAS, reason="no compiled kernels: no C++ compiler was found")
EPS = torch.finfo(torch.float32).eps


def _same(got: Tensor, expected: Tensor) -> bool:
    """Equal to the bit, NaN being NaN, and zeros of either sign zero."""
    return got.dtype == expected.dtype and bool(((got == expected) | (got.isnan() & expected.isnan())).all())


@pytest.mark.parametrize("isa", KNOWN_ISAS)
def test_an_instruction_set_that_is_not_here_is_skipped_loudly(isa: str) -> None:
    if isa not in ISAS:
        pytest.skip(f"this machine does not have {isa}: its kernels are not tested here")
    with forced(isa):
        assert torch.ops.foveate._cpu_isa("") == isa


def test_the_environment_can_force_an_instruction_set_that_is_here_and_no_other() -> None:
    code = (
        "import os\n"
        "from foveate.kernels.backends.table import ensure_loaded\n"
        "os.environ['FOVEATE_CPU'] = 'mmx'\n"
        "try: ensure_loaded()\n"
        "except RuntimeError as error: print(error)\n"
        "os.environ['FOVEATE_CPU'] = 'portable'\n"
        "print(ensure_loaded().isa)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, *_, last = done.stdout.splitlines()
    assert first.startswith("instruction set (=mmx) is not one of avx512_vnni, avx2, portable")
    assert last == "portable"


@settings(max_examples=200)
@given(calls())
def test_every_instruction_set_gives_the_bits_of_the_reference(call: Call) -> None:
    expected = call.by_reference()
    for isa in ISAS:
        with forced(isa):
            for got, want in zip(call.run(), expected, strict=True):
                assert got.shape == want.shape
                assert _same(got, want), isa


@settings(max_examples=60)
@given(call=calls(), levels=st.sampled_from([(32, 32), (8, 32), (32, 4)]))
def test_float_inputs_are_a_float_product(call: Call, levels: tuple[int, int]) -> None:
    maps = len(call.input_level)
    call.input_level = torch.tensor([levels[which % 2] for which in range(maps)], dtype=torch.uint8)
    for got, want, w in zip(call.run(), call.by_reference(), call.weights, strict=True):
        # K products in any order, each at most |x| |w|, and the rounding of the output's dtype
        largest = float(w.scales.abs().max()) * 10 if w.scales.numel() else 0.0
        if w.exact is not None:
            largest = max(largest, float(w.exact.values.abs().max()))
        size = call.x.shape[-1] * float(call.x.abs().max() if call.x.numel() else 0) * largest
        bound = call.x.shape[-1] * EPS * size + 2 * torch.finfo(got.dtype).eps * want.float().abs() + 1e-30
        assert got.dtype == want.dtype
        assert bool(((got.float() - want.float()).abs() <= bound).all())


@settings(max_examples=60)
@given(
    rows=ROWS,
    columns=COLUMNS,
    group=st.sampled_from((32, 64, 128)),
    reach=st.integers(0, 3),
    row_gains=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_unpack_and_embedding(rows: int, columns: int, group: int, reach: int, row_gains: bool, seed: int) -> None:
    w = coded(rows, columns, group=group, reach=reach, row_gains=row_gains, seed=seed).planes
    if seed % 2:
        w = w.kept(random_levels(w, seed))
    if seed % 3 == 0:
        w = with_exact(w, 0.5, torch.bfloat16, seed)
    levels = torch.stack([random_levels(w, seed + 1), random_levels(w, seed + 2)])
    if w.exact is not None:
        levels[0] = torch.maximum(levels[0], w.exact.levels())
    w = replace(w, active_levels=levels)
    indices = torch.randint(0, rows, (3, 5), generator=generator(seed))
    for which in (0, 1):
        expected = reference.plane_unpack(w.tensors, w.geometry, which)
        for isa in ISAS:
            with forced(isa):
                assert _same(w.dequantize(which), expected)
                for kind in (torch.int64, torch.int32):
                    maps = torch.full((15, 2), which, dtype=torch.uint8)
                    got = torch.ops.foveate.plane_embedding(indices.to(kind), w.tensors, w.geometry, maps)
                    assert _same(got, expected[indices])
                    assert which or _same(torch.ops.foveate.plane_embedding(indices, w.tensors, w.geometry, None), got)


@pytest.mark.parametrize("level", [4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [32, 128])
def test_a_row_does_not_depend_on_its_batch_or_on_threads(level: int, dtype: torch.dtype, group: int) -> None:
    call = simple(200, 260, 70, level=level, dtype=dtype, group=group)
    (alone,) = call.run()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for m in (1, 2, 3, 4, 5, 8, 11, 16, 33, 70):
            call_m = Call(call.x[:m], call.weights, call.biases, call.input_level)
            assert torch.equal(call_m.run()[0], alone[:m]), (threads, m)
    for row in range(0, 70, 23):
        call_1 = Call(call.x[row : row + 1], call.weights, call.biases, call.input_level)
        assert torch.equal(call_1.run()[0], alone[row : row + 1])


@pytest.mark.parametrize("level", [8, 16])
def test_a_row_does_not_depend_on_hundreds_of_others(level: int) -> None:
    call = simple(40, 100, 520, level=level)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        (y,) = call.run()
        for row in (0, 255, 256, 257, 511, 512, 519):
            alone = Call(call.x[row : row + 1], call.weights, call.biases, call.input_level)
            assert torch.equal(alone.run()[0], y[row : row + 1]), (threads, row)


def test_a_row_does_not_depend_on_what_shares_its_call() -> None:
    call = simple(64, 130, 12)
    other = coded(50, 130, seed=9).planes
    other = replace(other, active_levels=other.stored_levels.expand(2, -1, -1).clone())
    chosen = torch.arange(12) % 3 == 0
    first, second = (
        Call(call.x, call.weights, call.biases, call.input_level, c).run()[0] for c in (torch.zeros(12), torch.ones(12))
    )
    mixed, _ = linear(call.x, [*call.weights, other], [*call.biases, torch.empty(0)], call.input_level, pairs(chosen))
    assert torch.equal(mixed, torch.where(chosen[:, None], second, first))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("level", [4, 8, 16, 32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("weight_level", [0, 2, 8])
def test_a_row_that_is_not_finite_gives_nan_and_harms_no_other(level: int, bad: float, weight_level: int) -> None:
    call = simple(40, 100, 6, level=level)
    call.weights[0].active_levels.fill_(weight_level)
    (clean,) = call.run()
    call.x[2, 99] = bad
    for isa in ISAS:
        with forced(isa):
            (y,) = call.run()
            others = [0, 1, 3, 4, 5]
            if level != 32:
                assert bool(y[2].isnan().all())
                assert torch.equal(y[others], clean[others])
            else:
                assert not bool(y[2].isfinite().any())
                assert torch.allclose(y[others], clean[others], rtol=1e-5, atol=1e-5)
    assert bool(call.by_reference()[0][others].isfinite().all())


@pytest.mark.parametrize("level", [4, 8, 16, 32])
def test_rows_of_zeros_give_the_bias(level: int) -> None:
    call = simple(40, 100, 3, level=level)
    call.x[1] = 0
    for isa in ISAS:
        with forced(isa):
            assert torch.equal(call.run()[0][1], call.biases[0])


@pytest.mark.parametrize("level", [4, 8, 16])
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1.2e-38, 1e-36, 1e30, 3e38])
def test_tiny_and_huge_rows(level: int, size: float) -> None:
    call = simple(40, 100, 4, level=level)
    call.x = call.x / call.x.abs().max() * size
    call.x[0, 0] = size
    expected = call.by_reference()[0]
    for isa in ISAS:
        with forced(isa):
            assert _same(call.run()[0], expected), isa


def test_a_tile_at_level_0_is_skipped_whole() -> None:
    call = simple(32, 64, 3)
    call.weights[0].active_levels.fill_(0)
    assert torch.equal(call.run()[0], call.biases[0].expand(3, -1))
    assert float(call.weights[0].dequantize().abs().max()) == 0


def test_bytes_of_planes_that_no_level_reads_do_not_matter() -> None:
    """Reading 4 bits with planes 3 and 4 poisoned, and tiles' neighbours with them."""
    call = simple(48, 128, 7)
    w = call.weights[0]
    w.active_levels.fill_(4)
    (before,) = call.run()
    for plane in w.planes[3:]:
        plane.fill_(0xFF)
    for isa in ISAS:
        with forced(isa):
            assert torch.equal(call.run()[0], before)


def test_a_forced_instruction_set_must_exist() -> None:
    with pytest.raises(RuntimeError, match=r"instruction set \(=mmx\) is not one of"):
        torch.ops.foveate._cpu_isa("mmx")


def _replace(index: int, make: Callable[[object], object]) -> Callable[[Call], tuple[object, ...]]:
    def args(call: Call) -> tuple[object, ...]:
        listed = list(call.op_args())
        listed[index] = make(listed[index])
        return tuple(listed)

    return args


def _at(place: int, make: Callable[[Tensor], Tensor], exact: bool = False) -> Callable[[Call], tuple[object, ...]]:
    """Another tensor at a place of the weight, of which all tiles are exact if `exact`."""

    def replaced(call: Call) -> tuple[object, ...]:
        if exact:
            whole = with_exact(call.weights[0], 1.0, torch.float16)
            assert whole.exact is not None
            call.weights[0] = replace(whole, active_levels=whole.exact.levels()[None].repeat(2, 1, 1))
        return _replace(1, lambda listed: [make(t) if i == place else t for i, t in enumerate(listed)])(call)  # type: ignore[arg-type, var-annotated]

    return replaced


PLANE, SCALES, GAIN, STARTS, RESIDENT, VALUES, NUMBERS, OFFSETS, TAGS = 0, *range(PLANES, PLANES + 8)

MALFORMED = {
    "too few tensors": _replace(1, lambda v: v[:-1]),  # type: ignore[index]
    "a plane cut off": _at(PLANE, lambda t: t[:-1]),
    "a plane short by a tile": _at(PLANE, lambda t: t[: -32 * 16 // 4]),
    "a plane of another dtype": _at(PLANE, lambda t: t.to(torch.int32)),
    "a plane not contiguous": _at(PLANE, lambda t: t.repeat_interleave(2)[::2]),
    "no weights": _replace(1, lambda v: []),
    "scales cut off": _at(SCALES, lambda t: t[:-32]),
    "scales in float32": _at(SCALES, lambda t: t.float()),
    "gains of another shape": _at(GAIN, lambda t: t[:, :7].contiguous()),
    "gains of one level": _at(GAIN, lambda t: t[:1]),
    "gains in float32": _at(GAIN, lambda t: t.float()),
    "starts past the end": _at(STARTS, lambda t: t + 1),
    "starts below zero": _at(STARTS, lambda t: t - 5),
    "starts far away": _at(STARTS, lambda t: t + 2**40),
    "starts of another shape": _at(STARTS, lambda t: t[:, :5]),
    "resident of a level that does not exist": _at(RESIDENT, lambda t: torch.full_like(t, 5)),
    "resident of another grid": _at(RESIDENT, lambda t: t[:, 1:]),
    "tags of a level that does not exist": _at(TAGS, lambda t: torch.full_like(t, 7)),
    "exact values without an index": _at(VALUES, lambda t: torch.zeros(16 * 32)),
    "exact values cut off": _at(VALUES, lambda t: t[:-1], exact=True),
    "exact values of integers": _at(VALUES, lambda t: t.int(), exact=True),
    "numbers of exact tiles in int64": _at(NUMBERS, lambda t: t.long(), exact=True),
    "numbers of exact tiles outside": _at(NUMBERS, lambda t: t + 100, exact=True),
    "numbers of exact tiles below zero": _at(NUMBERS, lambda t: t - 100, exact=True),
    "a number of an exact tile too many": _at(NUMBERS, lambda t: torch.cat([t, t[:1]]), exact=True),
    "offsets of exact tiles cut off": _at(OFFSETS, lambda t: t[:-1], exact=True),
    "offsets of exact tiles past the end": _at(OFFSETS, lambda t: t + 1, exact=True),
    "offsets of exact tiles far away": _at(OFFSETS, lambda t: t + 2**40, exact=True),
    "offsets of exact tiles below zero": _at(OFFSETS, lambda t: t - 5, exact=True),
    "offsets of exact tiles that fall": _at(OFFSETS, lambda t: t.flip(0), exact=True),
    "tags of no map": _at(TAGS, lambda t: t[:0]),
    "tags of nine maps": _at(TAGS, lambda t: t[:1].expand(9, -1, -1).clone()),
    "a bias of another length": _replace(2, lambda v: [v[0][1:]]),  # type: ignore[index]
    "a bias in bfloat16": _replace(2, lambda v: [v[0].bfloat16()]),  # type: ignore[index]
    "no biases": _replace(2, lambda v: []),
    "a bias too many": _replace(2, lambda v: [*v, *v]),  # type: ignore[misc]
    "no form": _replace(3, lambda v: []),
    "a form cut off": _replace(3, lambda v: v[:3]),  # type: ignore[index]
    "rows below zero": _replace(3, lambda v: [-1, *v[1:]]),  # type: ignore[index]
    "too many rows": _replace(3, lambda v: [400, *v[1:]]),  # type: ignore[index]
    "other columns": _replace(3, lambda v: [v[0], 99, *v[2:]]),  # type: ignore[index]
    "another group": _replace(3, lambda v: [*v[:2], 128, *v[3:]]),  # type: ignore[index]
    "a group that does not exist": _replace(3, lambda v: [*v[:2], 48, v[3]]),  # type: ignore[index]
    "a reach that does not exist": _replace(3, lambda v: [*v[:3], 4, v[4]]),  # type: ignore[index]
    "an exponent that does not exist": _replace(3, lambda v: [*v[:4], 33]),  # type: ignore[index]
    "an input level that does not exist": _replace(4, lambda t: torch.full((2,), 5, dtype=torch.uint8)),
    "no input level": _replace(4, lambda t: t[:0]),  # type: ignore[index]
    "input levels in int64": _replace(4, lambda t: t.long()),  # type: ignore[attr-defined]
    "maps of another number of rows": _replace(5, lambda v: torch.zeros(3, 2, dtype=torch.uint8)),
    "maps in float": _replace(5, lambda v: torch.zeros(5, 2)),
    "a map that is not there": _replace(5, lambda v: torch.full((5, 2), 2, dtype=torch.uint8)),
    "a map beyond all tables": _replace(5, lambda v: torch.full((5, 2), 200, dtype=torch.uint8)),
    "two maps for a row": _replace(5, lambda v: torch.tensor([[0, 1]] * 5, dtype=torch.uint8)),
    "an order of another length": _replace(6, lambda v: torch.arange(7)),
    "an order in int32": _replace(6, lambda v: torch.arange(100, dtype=torch.int32)),
    "an order outside": _replace(6, lambda v: torch.arange(100) + 1),
    "an order below zero": _replace(6, lambda v: torch.arange(100) - 1),
    "x of integers": _replace(0, lambda v: torch.ones(5, 100, dtype=torch.int64)),
    "x without dimensions": _replace(0, lambda v: torch.tensor(1.0)),
    "x of other columns": _replace(0, lambda v: torch.ones(5, 300)),
}


@pytest.mark.parametrize("what", MALFORMED)
@pytest.mark.parametrize("level", [8, 32])
def test_malformed_arguments_are_errors(what: str, level: int) -> None:
    call = simple(level=level)
    call.weights[0].active_levels.fill_(8)
    for isa in ISAS:
        with forced(isa), pytest.raises((RuntimeError, IndexError)):
            torch.ops.foveate.plane_linear(*MALFORMED[what](call))


@pytest.mark.parametrize(("strip", "start"), [(0, -1), (0, -3), (-1, 1), (1, 2**40), (1, -(2**40))])
@pytest.mark.parametrize("level", [2, 8])
def test_a_run_of_tiles_from_a_bad_start_is_an_error(strip: int, start: int, level: int) -> None:
    call = simple(level=8, columns=300)
    w = call.weights[0]
    w.active_levels.fill_(level)
    w.tile_offsets[strip] += start
    for isa in ISAS:
        with forced(isa), pytest.raises(RuntimeError, match="tile_offsets and stored_levels place a tile beyond"):
            call.run()


@pytest.mark.parametrize("index", [-1, 40, 2**40])
def test_an_embedding_index_outside_is_an_error(index: int) -> None:
    w = coded(40, 50).planes
    with pytest.raises(IndexError, match=r"is not a row of the embedding, 0..39"):
        torch.ops.foveate.plane_embedding(torch.tensor([0, index]), w.tensors, w.geometry, None)


def test_columns_must_fit_the_weight_even_within_the_padding() -> None:
    w = coded(16, 50).planes
    with pytest.raises(FoveateError, match="x has 49 columns, the weight 50"):
        linear(torch.ones(2, 49), [w], [torch.empty(0)], torch.full((2,), 8, dtype=torch.uint8))
