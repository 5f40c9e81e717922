"""Linear layers of torch, torchao, optimum-quanto and hqq, as each stores and multiplies them on a CPU.

It runs with the Python that has the library. A layer is copied until the copies are far larger than the last cache.
They are multiplied one after the other, so every weight is read from memory. Each form computes in the dtype that is
fastest in its library, and is compiled where that is faster.

    {"do": "make", "form": "torchao int4", "width": 4096, "set_bytes": 1 << 28, "threads": 2} -> {"bits", "bytes", ...}
    {"do": "time", "rows": 1, "passes": 3}                                                    -> {"seconds"}
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
import torch._dynamo
from answers import serve
from torch import Tensor, nn

#: Copies per stack. A stack is one call, so its copies share the cost of a call in Python.
STACK = 4
WARM_UP = 3


@dataclass(frozen=True)
class Form:
    """One way to store a linear layer.

    Attributes:
        package: the package that makes it.
        bits: bits per weight.
        make: `make(layer)` gives the layer in that form, from a float32 `nn.Linear` without bias.
        dtype: the dtype of its input.
        compiled: whether it runs under `torch.compile`, with weights as constants.
    """

    package: str
    bits: int
    make: Callable[[nn.Linear], nn.Module]
    dtype: torch.dtype
    compiled: bool = False
    constant: bool = False


def _torchao_int8(layer: nn.Linear) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    made = layer.to(torch.bfloat16)
    quantize_(made, Int8WeightOnlyConfig())
    return made


def _torchao_dynamic_int8(layer: nn.Linear) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    made = layer.to(torch.bfloat16)
    quantize_(made, Int8DynamicActivationInt8WeightConfig())
    return made


def _torchao_int4(layer: nn.Linear) -> nn.Module:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig  # the only one with a CPU kernel
    from torchao.quantization import quantize_

    made = layer.to(torch.bfloat16)
    quantize_(made, PrototypeInt4WeightOnlyConfig(group_size=128))
    return made


def _torchao_dynamic_int4(layer: nn.Linear) -> nn.Module:
    from torchao.prototype.quantization.int4 import Int8DynamicActivationInt4WeightConfig  # not in every wheel
    from torchao.quantization import quantize_

    made = layer.to(torch.bfloat16)
    quantize_(made, Int8DynamicActivationInt4WeightConfig(group_size=128))
    return made


def _quanto(name: str) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        from optimum import quanto

        made = nn.Sequential(layer.to(torch.bfloat16))
        quanto.quantize(made, weights=getattr(quanto, name))
        quanto.freeze(made)
        return made

    return make


def _hqq(bits: int, dtype: torch.dtype) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
        config["weight_quant_params"]["optimize"] = False  # it takes a second, and changes values only
        made: nn.Module = HQQLinear(layer, config, compute_dtype=dtype, device="cpu")
        return made

    return make


def _torch_dynamic_int8(layer: nn.Linear) -> nn.Module:
    made: nn.Module = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, dtype=torch.qint8)
    return made


FORMS: dict[str, Form] = {
    "torch float32": Form("torch", 32, lambda layer: layer, torch.float32),
    "torch bfloat16": Form("torch", 16, lambda layer: layer.to(torch.bfloat16), torch.bfloat16),
    "torch dynamic int8": Form("torch", 8, _torch_dynamic_int8, torch.float32),
    "torchao int8": Form("torchao", 8, _torchao_int8, torch.bfloat16, compiled=True, constant=True),
    "torchao dynamic int8": Form("torchao", 8, _torchao_dynamic_int8, torch.bfloat16, compiled=True, constant=True),
    "torchao int4": Form("torchao", 4, _torchao_int4, torch.bfloat16),
    "torchao dynamic int4": Form("torchao", 4, _torchao_dynamic_int4, torch.bfloat16, compiled=True, constant=True),
    "quanto qint8": Form("optimum-quanto", 8, _quanto("qint8"), torch.bfloat16),
    "quanto qint4": Form("optimum-quanto", 4, _quanto("qint4"), torch.bfloat16),
    "quanto qint2": Form("optimum-quanto", 2, _quanto("qint2"), torch.bfloat16),
    "hqq 8": Form("hqq", 8, _hqq(8, torch.bfloat16), torch.bfloat16, compiled=True),
    "hqq 4": Form("hqq", 4, _hqq(4, torch.float32), torch.float32, compiled=True),
    "hqq 3": Form("hqq", 3, _hqq(3, torch.float32), torch.float32, compiled=True),
    "hqq 2": Form("hqq", 2, _hqq(2, torch.float32), torch.float32, compiled=True),
}


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a tensor is made of."""
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    if not names:
        yield tensor
    for name in names:
        yield from _plain(getattr(tensor, name))


def _stored_bytes(module: nn.Module, rows: int) -> int:
    """The bytes of a layer that a product reads."""
    total = 0
    for part in module.modules():
        if isinstance(part, torch.ao.nn.quantized.Linear):  # a byte per weight, a scale and an offset per row
            total += part.in_features * part.out_features + 8 * rows
        tensors = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        tensors += [v for v in getattr(part, "meta", {}).values() if isinstance(v, Tensor)]  # where hqq keeps scales
        total += sum(t.numel() * t.element_size() for whole in tensors for t in _plain(whole.detach()))
    return total


class Layers:
    """The copies of one form, which are timed."""

    def make(self, form: str, width: int, set_bytes: int, threads: int) -> dict[str, Any]:
        """Make the copies."""
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.form, self.width = FORMS[form], width
        layer = nn.Linear(width, width, bias=False).requires_grad_(False)
        size = _stored_bytes(self.form.make(copy.deepcopy(layer)), width)
        count = max(2, -(-set_bytes // (STACK * size)))
        stacks: list[Any] = [
            nn.Sequential(*(self.form.make(copy.deepcopy(layer)) for _ in range(STACK))) for _ in range(count)
        ]
        if self.form.compiled:
            torch._dynamo.config.recompile_limit = 4 * count  # one for each stack and count of rows
            stacks = [torch.compile(s, dynamic=False, options={"freezing": self.form.constant}) for s in stacks]
        self.stacks = stacks
        return {
            "bits": self.form.bits,
            "bytes": size,
            "dtype": str(self.form.dtype).removeprefix("torch."),
            "compiled": self.form.compiled,
            "version": metadata.version(self.form.package),
        }

    def time(self, rows: int, passes: int, stacks: int | None = None) -> dict[str, float]:
        """Seconds per product with `rows` rows of x: the mean over the first stacks or all, the median over passes."""
        x_MK = torch.randn(rows, self.width, generator=torch.Generator().manual_seed(rows)).to(self.form.dtype)
        used = self.stacks[:stacks]
        for _ in range(WARM_UP):
            used[-1](x_MK)
        seen = []
        for _ in range(passes):
            started = time.perf_counter()
            for stack in used:
                stack(x_MK)
            seen.append((time.perf_counter() - started) / (STACK * len(used)))
        return {"seconds": statistics.median(seen)}


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    here = Layers()
    serve({"make": here.make, "time": here.time})
