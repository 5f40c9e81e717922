"""Schemas, fakes, gradients and compilation of the ops, whatever backend runs them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from foveate.kernels import dispatch, reference
from foveate.nn.modules import PlaneEmbedding, PlaneLinear, PlaneWeight
from foveate.planes import linear
from kernels.cases import Call, simple
from tiny import coded, generator, random_levels

dispatch.ensure_loaded()
EPS = torch.finfo(torch.float32).eps


def _dense_gradient(call: Call, grads: list[Tensor], ordered: bool) -> Tensor:
    total = torch.zeros(call.x.shape, dtype=torch.float64)
    for w, g in zip(call.weights, grads, strict=True):
        rows = torch.stack([g.double() @ w.dequantize(which).double() for which in (0, 1)])
        which = torch.zeros(len(g), dtype=torch.long) if call.choice is None else call.choice.long()
        part = rows[which, torch.arange(len(g))]
        if ordered:
            assert call.order is not None
            part = part[:, torch.argsort(call.order)]
        total += part
    return total


@pytest.mark.parametrize("input_level", [4, 8, 16, 32])
@pytest.mark.parametrize("choice", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_gradients_go_straight_through(input_level: int, choice: bool, ordered: bool) -> None:
    call = simple(24, 70, 6, level=input_level)
    other = coded(17, 70, seed=3, reach=1).planes
    other.tags[1].copy_(random_levels(other, 8))
    call.weights.append(other)
    call.biases = [call.biases[0].requires_grad_(), torch.randn(17).requires_grad_()]
    call.x.requires_grad_()
    call.choice = torch.tensor([0, 1, 1, 0, 1, 0]).bool() if choice else None
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


def test_backward_sees_the_levels_that_forward_read() -> None:
    call = simple(24, 70, 4)
    call.x.requires_grad_()
    w = call.weights[0]
    expected = torch.ones(4, 24) @ w.dequantize()
    (y,) = call.run()
    w.tags.fill_(0)
    y.sum().backward()
    assert call.x.grad is not None
    assert torch.allclose(call.x.grad, expected, atol=1e-5)


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
        call.choice = torch.tensor([True, False, True, True])
        call.order = torch.randperm(70)
        call.weights.append(coded(17, 70, seed=3).planes)
        call.biases.append(torch.empty(0))
    torch.library.opcheck(torch.ops.foveate.plane_linear.default, call.op_args())
    if not gradient:
        torch.library.opcheck(torch.ops.foveate.plane_linear_no_grad.default, call.op_args())


def test_opcheck_unpack_and_embedding() -> None:
    w = coded(24, 70, row_gains=True).planes
    torch.library.opcheck(torch.ops.foveate.plane_unpack.default, (list(w.tensors), list(w.form), 1))
    indices = torch.tensor([[1, 23], [0, 7]])
    torch.library.opcheck(torch.ops.foveate.plane_embedding.default, (indices, list(w.tensors), list(w.form), 0))


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
                weight.value.tags.fill_(level)
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
    assert backends[-1].name == "reference"


def test_a_handle_stands_for_its_weight_while_it_lives() -> None:
    call = simple(24, 70, 4)
    w = call.weights[0]
    op = torch.ops.foveate.plane_linear_by_handle
    none = torch.empty(0)
    levels = [call.input_level.clone() for _ in range(3)]
    handle = torch.ops.foveate.plane_handle([*w.tensors] * 3, [*w.form] * 3, levels, [])
    rows = [24] * 3
    args = (call.x, handle, [call.biases[0], none, none], rows)
    for level in (8, 16, 4):  # seen through the handle
        levels[1].fill_(level)
        first, second, third = op(*args)
        assert torch.equal(first, call.run()[0])
        assert torch.equal(second, linear(call.x, [w], [none], levels[1])[0])
        assert torch.equal(third, op(call.x, handle, [], rows)[0])
    torch.library.opcheck(op.default, args)
    with pytest.raises(RuntimeError, match=r"rows \(=25\) are not those of the weight, 24"):
        op(call.x, handle, [], [24, 24, 25])
    with pytest.raises(RuntimeError, match="there are 3 weights, and rows of 1"):
        op(call.x, handle, [], [24])
    with pytest.raises(RuntimeError, match="there are 3 weights, and 1 biases"):
        op(call.x, handle, [none], rows)
    with pytest.raises(RuntimeError, match="there are 2 input levels, and 5 numbers of forms, not 5 an input level"):
        torch.ops.foveate.plane_handle(w.tensors, w.form, levels[:2], [])
    copied = handle.clone()
    assert torch.equal(op(call.x, copied, [], rows)[0], third)
    del handle, args
    with pytest.raises(RuntimeError, match="stands for no weight of this process: its weight is gone"):
        op(call.x, copied, [], rows)


def test_the_reference_has_handles_too() -> None:
    call = simple(24, 70, 4)
    w = call.weights[0]
    levels = [torch.full((2,), level, dtype=torch.uint8) for level in (8, 16)]
    handle = reference.plane_handle([*w.tensors] * 2, [*w.form] * 2, levels, [])
    args = ([call.biases[0], torch.empty(0)], [24, 24])
    first, second = reference.plane_linear_by_handle(call.x, handle, *args)
    assert torch.equal(first, call.by_reference()[0])
    assert torch.equal(second, reference.plane_linear(call.x, w.tensors, [torch.empty(0)], w.form, levels[1])[0])
    assert torch.equal(reference.plane_linear_by_handle(call.x, handle, [], [24, 24])[1], second)
    with pytest.raises(RuntimeError, match=r"rows \(=\[24\]\) are not those of the weights, \[24, 24\]"):
        reference.plane_linear_by_handle(call.x, handle, [], [24])
    copied = handle.clone()
    del handle
    with pytest.raises(RuntimeError, match="its weight is gone"):
        reference.plane_linear_by_handle(call.x, copied, *args)
