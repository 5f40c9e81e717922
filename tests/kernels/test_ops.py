"""Schemas, fakes, gradients and compilation of the ops, whatever backend runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from foveate.errors import DeviceError
from foveate.kernels.backends import table as dispatch
from foveate.kernels.planes import reference
from foveate.nn.modules import PlaneEmbedding, PlaneLinear
from foveate.nn.weight import PlaneWeight
from foveate.planes import PlaneTensor, linear
from kernels.cases import Call, simple
from tiny import coded, generator, random_levels, with_exact

dispatch.ensure_loaded()
EPS = torch.finfo(torch.float32).eps


def _dense_gradient(call: Call, grads: list[Tensor], ordered: bool) -> Tensor:
    total = torch.zeros(call.x.shape, dtype=torch.float64)
    for w, g in zip(call.weights, grads, strict=True):
        rows = torch.stack([g.double() @ w.dequantize(which).double() for which in (0, 1)])
        which = torch.zeros(len(g), dtype=torch.long) if call.map_of_row is None else call.map_of_row.long()
        part = rows[which, torch.arange(len(g))]
        if ordered:
            assert call.order is not None
            part = part[:, torch.argsort(call.order)]
        total += part
    return total


@pytest.mark.parametrize("input_level", [4, 8, 16, 32])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_gradients_go_straight_through(input_level: int, several: bool, ordered: bool) -> None:
    call = simple(24, 70, 6, level=input_level)
    other = coded(17, 70, seed=3, reach=1).planes
    other = replace(other, active_levels=torch.stack([other.stored_levels, random_levels(other, 8)]))
    call.weights.append(other)
    call.biases = [call.biases[0].requires_grad_(), torch.randn(17).requires_grad_()]
    call.x.requires_grad_()
    call.map_of_row = torch.tensor([0, 1, 1, 0, 1, 0]) if several else None
    call.order = torch.randperm(70, generator=generator(2)) if ordered else None
    outputs = call.run()
    grads = [torch.randn(y.shape, generator=generator(i)) for i, y in enumerate(outputs)]
    torch.autograd.backward(outputs, grads)
    assert call.x.grad is not None
    expected = _dense_gradient(call, grads, ordered)
    assert torch.allclose(call.x.grad.double(), expected, rtol=0, atol=100 * EPS * float(expected.abs().max()))
    for bias, g in zip(call.biases, grads, strict=True):
        assert bias.grad is not None
        assert torch.allclose(bias.grad, g.sum(0), rtol=1e-6, atol=1e-6)


def test_levels_that_change_between_forward_and_backward_are_an_error() -> None:
    call = simple(24, 70, 4)
    call.x.requires_grad_()
    (y,) = call.run()
    call.weights[0].active_levels.fill_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_only_one_of_two_outputs_used() -> None:
    call = simple(24, 70, 4)
    other = coded(17, 70, seed=3).planes
    call.weights.append(other)
    call.biases.append(torch.randn(17).requires_grad_())
    call.x.requires_grad_()
    call.run()[1].sum().backward()
    assert call.x.grad is not None
    assert torch.allclose(call.x.grad, torch.ones(4, 17) @ other.dequantize(), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_come_in_the_dtype_of_x(dtype: torch.dtype) -> None:
    call = simple(24, 70, 4, dtype=dtype)
    call.x.requires_grad_()
    (y,) = call.run()
    y.float().sum().backward()
    assert call.x.grad is not None
    assert call.x.grad.dtype == dtype
    expected = torch.ones(4, 24) @ call.weights[0].dequantize()
    assert torch.allclose(call.x.grad.float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize(("gradient", "extras"), [(False, True), (True, False), (True, True)])
def test_opcheck_linear(gradient: bool, extras: bool) -> None:
    call = simple(24, 70, 4)
    call.x.requires_grad_(gradient)
    call.biases[0].requires_grad_(gradient)
    if extras:
        call.map_of_row = torch.tensor([1, 0, 1, 1])
        call.order = torch.randperm(70)
        other = coded(17, 70, seed=3).planes
        call.weights.append(replace(other, active_levels=other.stored_levels.expand(2, -1, -1).clone()))
        call.biases.append(torch.empty(0))
    torch.library.opcheck(torch.ops.foveate.plane_linear.default, call.op_args())
    if not gradient:
        torch.library.opcheck(torch.ops.foveate.plane_linear_no_grad.default, call.op_args())


def test_opcheck_unpack_and_embedding() -> None:
    w = coded(24, 70, row_gains=True).planes
    torch.library.opcheck(torch.ops.foveate.plane_unpack.default, (list(w.tensors), list(w.geometry), 0))
    indices = torch.tensor([[1, 23], [0, 7]])
    for maps in (None, torch.zeros(4, 2, dtype=torch.uint8)):
        args = (indices, list(w.tensors), list(w.geometry), maps)
        torch.library.opcheck(torch.ops.foveate.plane_embedding.default, args)


def test_float64_inputs_are_computed_in_float32() -> None:
    call = simple(24, 70, 4)
    (expected,) = call.run()
    call.x = call.x.double()
    (y,) = call.run()
    assert y.dtype == torch.float64
    assert torch.equal(y.float(), expected)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = PlaneEmbedding(PlaneWeight(coded(30, 64).planes, torch.float32))
        self.first = PlaneLinear(PlaneWeight(coded(48, 64, seed=1).planes, torch.float32), torch.randn(48))
        self.second = PlaneLinear(PlaneWeight(coded(20, 48, seed=2).planes, torch.float32))

    def forward(self, indices: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(self.embed(indices))))


def test_compiles_whole_and_a_switch_does_not_recompile() -> None:
    torch._dynamo.reset()
    model = _Model()
    indices = torch.randint(0, 30, (3, 7))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(indices), model(indices))
    before = model(indices)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for level in (2, 3, 4, 6, 0):
            for weight in (model.embed.weight, model.first.weight, model.second.weight):
                weight.value.active_levels.fill_(level)
            model.first.input_level.fill_(16 if level == 6 else 8)
            assert torch.equal(compiled(indices), model(indices))
            assert not torch.equal(model(indices), before)
    torch._dynamo.reset()


def test_compiled_gradients() -> None:
    torch._dynamo.reset()
    w = PlaneLinear(PlaneWeight(coded(20, 48).planes, torch.float32), torch.randn(20))
    x = torch.randn(5, 48, requires_grad=True)
    (expected,) = torch.autograd.grad(w(x).square().sum(), x)
    compiled = torch.compile(w, backend="aot_eager", fullgraph=True)
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert torch.equal(got, expected)
    torch._dynamo.reset()


def test_several_weights_share_one_call() -> None:
    call = simple(24, 70, 4)
    weights = [coded(n, 70, seed=n, reach=n % 3).planes for n in (5, 16, 33)]
    none = torch.empty(0)
    together = linear(call.x, weights, [none] * 3, call.input_level)
    for w, y in zip(weights, together, strict=True):
        assert torch.equal(linear(call.x, [w], [none], call.input_level)[0], y)


def test_backends_says_which_one_runs() -> None:
    backends = dispatch.backends()
    assert sum(b.runs for b in backends) == 1
    assert all(b.reason for b in backends)
    assert [b.name for b in backends if b.device == "cpu"][1:] == ["reference"]
    others = [b for b in backends if b.device != "cpu"]
    assert [b.device for b in others] == ["cuda", "mps", "xpu"]
    assert all(b.name == "none" and not b.runs and f"no kernels for {b.device}" in b.reason for b in others)


class _OnDevice(Tensor):
    """A tensor without memory that says it is on a device, which this machine need not have."""

    @staticmethod
    def __new__(cls, like: Tensor, device: str) -> _OnDevice:
        made: _OnDevice = torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=device)  # type: ignore[attr-defined]
        return made

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: object = (), kwargs: object = None) -> None:
        raise AssertionError("left out of the dispatch")


@contextmanager
def _dispatched_by_device() -> Iterator[None]:
    keys = torch._C.DispatchKey
    python = torch._C.DispatchKeySet(keys.Python) | torch._C.DispatchKeySet(keys.PythonTLSSnapshot)
    with torch._C._ExcludeDispatchKeyGuard(python):
        yield


@pytest.mark.parametrize("device", ["cuda:0", "mps", "xpu", "privateuseone"])
def test_a_device_without_a_backend_is_refused_with_a_sentence(device: str) -> None:
    """The reference would serve it slowly, in silence."""
    call = simple(24, 70, 4)
    x, tensors, *rest = call.op_args()
    there = _OnDevice(x, device)
    ops = torch.ops.foveate
    calls: dict[str, Callable[[], object]] = {
        "plane_linear": lambda: ops.plane_linear(there, tensors, *rest),
        "plane_linear_no_grad": lambda: ops.plane_linear_no_grad(there, tensors, *rest),
        "plane_unpack": lambda: ops.plane_unpack(
            [*tensors[:-1], _OnDevice(tensors[-1], device)], call.weights[0].geometry, 0
        ),
        "group_pack": lambda: ops.group_pack(there, 4, 32),
        "mask_pack": lambda: ops.mask_pack(there, 0.0),
    }
    with _dispatched_by_device():
        for name, run in calls.items():
            with pytest.raises(
                DeviceError, match=rf"foveate\.{name} has no kernels for device \(={device}\), only for the CPU"
            ):
                run()


def test_every_op_refuses_devices_through_one_function() -> None:
    ops = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("foveate::") and "::_" not in name]
    assert len(ops) >= 17
    for op in ops:
        for key in ("CUDA", "MPS", "XPU", "PrivateUse1"):
            assert not torch._C._dispatch_has_kernel_for_dispatch_key(op, key)
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CompositeExplicitAutograd")


def test_a_handle_stands_for_its_weight_while_it_lives() -> None:
    call = simple(24, 70, 4)
    w = call.weights[0]
    op = torch.ops.foveate.plane_linear_by_handle
    none = torch.empty(0)
    levels = [call.input_level.clone() for _ in range(3)]
    handle = torch.ops.foveate.plane_handle([*w.tensors] * 3, [*w.geometry] * 3, levels, [], [], [])
    rows = [24] * 3
    args = (call.x, handle, None, None, [call.biases[0], none, none], rows)
    for level in (8, 16, 4):  # seen through the handle
        levels[1].fill_(level)
        first, second, third = op(*args)
        assert torch.equal(first, call.run()[0])
        assert torch.equal(second, linear(call.x, [w], [none], levels[1])[0])
        assert torch.equal(third, op(call.x, handle, None, None, [], rows)[0])
    torch.library.opcheck(op.default, args)
    with pytest.raises(RuntimeError, match=r"rows \(=25\) are not those of the weight, 24"):
        op(call.x, handle, None, None, [], [24, 24, 25])
    with pytest.raises(RuntimeError, match="there are 3 weights, and rows of 1"):
        op(call.x, handle, None, None, [], [24])
    with pytest.raises(RuntimeError, match="there are 3 weights, and 1 biases"):
        op(call.x, handle, None, None, [none], rows)
    with pytest.raises(RuntimeError, match="there are 2 input levels, and 5 numbers of"):
        torch.ops.foveate.plane_handle(w.tensors, w.geometry, levels[:2], [], [], [])
    copied = handle.clone()
    assert torch.equal(op(call.x, copied, None, None, [], rows)[0], third)
    del handle, args
    with pytest.raises(RuntimeError, match="stands for no weight of this process: its weight is gone"):
        op(call.x, copied, None, None, [], rows)


EXCHANGES: dict[str, Callable[[Tensor], object]] = {
    "none left": lambda t: t.resize_(0),
    "more": lambda t: t.resize_(1 << 20),
    "its storage emptied": lambda t: t.untyped_storage().resize_(0),
    "its storage cut": lambda t: t.untyped_storage().resize_(t.untyped_storage().nbytes() - 1),
    "set to another": lambda t: t.set_(torch.zeros(1, dtype=t.dtype)),  # type: ignore[call-overload]
    "another's data": lambda t: setattr(t, "data", torch.zeros(1, dtype=t.dtype)),
    "not contiguous": lambda t: t.as_strided_(t.shape, [0] * t.dim()),
}


@pytest.mark.skipif(dispatch.ensure_loaded().isa is None, reason="no compiled kernels")
@pytest.mark.parametrize("how", EXCHANGES)
@pytest.mark.parametrize("place", [*range(13), "level", "range"])
def test_what_was_exchanged_behind_a_handle_is_an_error(how: str, place: int | str) -> None:
    call = simple(24, 70, 4)
    w = with_exact(call.weights[0], 1.0, torch.float16)
    assert w.exact is not None
    first = torch.arange(w.stored_levels.numel()).view(w.grid) == 0
    w = replace(w, exact=w.exact.chosen(first))
    w.active_levels[:] = torch.where(first, 16, 8)
    tensors, level, limits = [t.clone() for t in w.tensors], call.input_level, torch.tensor([-1.0, 1.0])
    handle = torch.ops.foveate.plane_handle(tensors, w.geometry, [level], [limits], [], [])
    torch.ops.foveate.plane_linear_by_handle(call.x, handle, None, None, [], [24])
    held = {"level": level, "range": limits}[place] if isinstance(place, str) else tensors[place]
    if how == "more" and place in range(6):
        pytest.skip("planes and scales may be longer: what is not asked for is not read")
    if how in ("set to another", "another's data", "not contiguous") and place == 10:
        pytest.skip("the group of one tile may be another")
    EXCHANGES[how](held)
    with pytest.raises(RuntimeError):
        torch.ops.foveate.plane_linear_by_handle(call.x, handle, None, None, [], [24])


HUGE = 2**63 - 1


@pytest.mark.skipif(dispatch.ensure_loaded().isa is None, reason="no compiled kernels")
@pytest.mark.parametrize("size", [HUGE, HUGE - 14, HUGE - 1023, 2**62, 2**60 + 1, -HUGE - 1])
def test_sizes_at_the_edge_of_int64_are_errors(size: int) -> None:
    ops, none = torch.ops.foveate, torch.empty(0, dtype=torch.uint8)
    w = coded(24, 70).planes
    wrong = [
        lambda: ops.group_unpack(none, none.view(0, 1).bfloat16(), 8, 32, size, torch.float32),
        lambda: ops.mask_unpack(none, torch.zeros(2), size),
        lambda: ops.narrow_unpack(none, 32, 0, size, torch.int64),
        lambda: ops.plane_unpack(w.tensors, (size, *w.geometry[1:]), 0),
        lambda: ops.plane_unpack(w.tensors, (w.geometry[0], size, *w.geometry[2:]), 0),
        lambda: ops.plane_unpack(w.tensors, (*w.geometry[:4], size), 0),
        lambda: ops.plane_embedding(torch.tensor([size]), w.tensors, w.geometry, None),
    ]
    for call in wrong:
        with pytest.raises((RuntimeError, IndexError)):
            call()


@pytest.mark.skipif(dispatch.ensure_loaded().isa is None, reason="no compiled kernels")
def test_values_at_the_edge_of_int64_are_errors_that_say_so() -> None:
    with pytest.raises(RuntimeError, match=f"x has values outside {HUGE - 3}..{HUGE}, the integers"):
        torch.ops.foveate.narrow_pack(torch.tensor([0]), 8, HUGE - 3)
    with pytest.raises(RuntimeError, match=r"n \(=9223372036854775807\) is not in 0..72057594037927936"):
        torch.ops.foveate.mask_unpack(torch.empty(0, dtype=torch.uint8), torch.zeros(2), HUGE)
    x = torch.zeros(3)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"x of shape \[3\] reaches beyond its storage of 0 bytes"):
        torch.ops.foveate.mask_pack(x, 0.0)


def test_groups_that_do_not_exist_are_errors_on_fakes_too() -> None:
    x = torch.empty(70, device="meta")
    for call in (torch.ops.foveate.group_pack, lambda x, _, group: torch.ops.foveate.group_variance(x, [4], group)):
        with pytest.raises(RuntimeError, match=r"group \(=0\) is not a multiple of 32"):
            call(x, 4, 0)


@pytest.mark.skipif(dispatch.ensure_loaded().isa is None, reason="no compiled kernels")
def test_no_columns_and_no_rows() -> None:
    w = PlaneTensor(
        planes=(torch.empty(0, dtype=torch.uint8),) * 5,
        scales=torch.empty(0, dtype=torch.uint8),
        gain=torch.ones(2, 1, dtype=torch.float16),
        stored_levels=torch.zeros(0, 1, dtype=torch.uint8),
        tile_offsets=torch.zeros(0, 6, dtype=torch.int64),
        active_levels=torch.zeros(2, 0, 1, dtype=torch.uint8),
        rows=0,
        columns=20,
        group=32,
        reach=0,
        exponent=0,
    )
    level = torch.full((2,), 8, dtype=torch.uint8)
    (y,) = linear(torch.zeros(1, 20).expand(2**58, 20), [w], [torch.empty(0)], level)
    assert y.shape == (2**58, 0)
    flat = replace(
        w, rows=8, columns=0, stored_levels=torch.zeros(1, 0, dtype=torch.uint8), tile_offsets=torch.zeros(1, 6).long()
    )
    flat = replace(flat, active_levels=torch.zeros(2, 1, 0, dtype=torch.uint8))
    assert torch.equal(linear(torch.zeros(3, 0), [flat], [torch.arange(8.0)], level)[0], torch.arange(8.0).expand(3, 8))


def test_the_reference_has_handles_too() -> None:
    call = simple(24, 70, 4)
    w = call.weights[0]
    levels = [torch.full((2,), level, dtype=torch.uint8) for level in (8, 16)]
    handle = reference.plane_handle([*w.tensors] * 2, [*w.geometry] * 2, levels, [], [], [])
    args = ([call.biases[0], torch.empty(0)], [24, 24])
    first, second = reference.plane_linear_by_handle(call.x, handle, None, None, *args)
    assert torch.equal(first, call.by_reference()[0])
    assert torch.equal(second, reference.plane_linear(call.x, w.tensors, [torch.empty(0)], w.geometry, levels[1])[0])
    assert torch.equal(reference.plane_linear_by_handle(call.x, handle, None, None, [], [24, 24])[1], second)
    with pytest.raises(RuntimeError, match=r"rows \(=\[24\]\) are not those of the weights, \[24, 24\]"):
        reference.plane_linear_by_handle(call.x, handle, None, None, [], [24])
    copied = handle.clone()
    del handle
    with pytest.raises(RuntimeError, match="its weight is gone"):
        reference.plane_linear_by_handle(call.x, copied, None, None, *args)
