"""A GGUF model quantized by llama.cpp with an importance matrix, as its users do it, and what that takes.

It needs llama-cpp-python, which has the library without the tool that makes importance matrices. So this script does
what llama.cpp's `tools/imatrix/imatrix.cpp` does: the library calls back around each op, and the inputs of every matrix
product in a block are squared and added up by columns. Like the tool it computes the logits of every token, since the
last block is cut short without them; unlike the tool it computes no perplexity (`--no-ppl`).

    {"do": "widen", "source": FILE, "out": FILE}  ->  {}
    {"do": "importance", "source": FILE, "tokens": FILE, "threads": 2, "out": FILE}
    ->  {"seconds", "seconds_cpu", "peak", "version", "matrices": that have an entry}
    {"do": "quantize", "source": FILE, "importance": FILE, "type": "Q4_K_M", "threads": 2, "out": FILE}
    ->  {"seconds", "seconds_cpu", "peak"}

`widen` writes a model in float16, which is what llama.cpp's converter makes of a float32 model. The file of tokens is a
numpy array, int64 [n, T]. Seconds are without imports and without loading the model; a quantized file is written.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from answers import serve
from llama_engine import Engine
from llama_model import about, clear, requantized, start
from meter import Meter

_DIMENSIONS, _SOURCES, _NAME, _PARAMETERS = 4, 10, 64, 16
_FLOAT32 = 0
_PRODUCT = b"MUL_MAT"
#: The fewest rows of inputs that imatrix.cpp counts.
_ROWS = 16
SOURCE = "source"


class Tensor(ctypes.Structure):
    """The head of `ggml_tensor` in ggml.h. Dimensions are the innermost first."""


_Pointer = ctypes.POINTER(Tensor)
Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * _DIMENSIONS),
    ("nb", ctypes.c_size_t * _DIMENSIONS),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * _PARAMETERS),
    ("flags", ctypes.c_int32),
    ("src", _Pointer * _SOURCES),
    ("view_src", _Pointer),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * _NAME),
]


class Importance:
    """The mean squares of the inputs of every matrix of a block, by the matrix's name.

    Attributes:
        rows: how many inputs each matrix has had.
        callback: for `cb_eval`. Python ignores what is raised in it, so it raises nothing.
    """

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray[Any, Any]] = {}
        self.rows: dict[str, int] = {}
        self.callback = llama_cpp.llama_cpp.ggml_backend_sched_eval_callback(self._see)

    def means(self) -> dict[str, np.ndarray[Any, Any]]:
        """The mean squares, float32 [K]."""
        return {name: (sums_K / self.rows[name]).astype(np.float32) for name, sums_K in self._sums.items()}

    def _see(self, address: int, ask: bool, _: Any) -> bool:
        """Asked before an op, whether its inputs are wanted; told after it that they are there."""
        tensor = Tensor.from_address(address)
        if _operation(tensor.op) != _PRODUCT:
            return not ask
        weight, inputs = tensor.src[0].contents, tensor.src[1].contents
        if not ask:
            self._add(weight.name.decode(), inputs)
            return True
        matrix = inputs.ne[1] >= _ROWS and inputs.ne[2] == inputs.ne[3] == 1
        return bool(matrix and inputs.type == _FLOAT32 and weight.name.startswith(b"blk."))

    def _add(self, name: str, inputs: Tensor) -> None:
        columns, rows = inputs.ne[:2]
        stride = inputs.nb[1] // ctypes.sizeof(ctypes.c_float)
        held = (ctypes.c_float * (stride * rows)).from_address(inputs.data)
        x_MK = np.ctypeslib.as_array(held).reshape(rows, stride)[:, :columns]
        self._sums[name] = self._sums.get(name, 0) + np.square(x_MK).sum(0)
        self.rows[name] = self.rows.get(name, 0) + rows


@cache
def _operation(number: int) -> bytes:
    """The name of an op."""
    base = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.glob("lib/libggml-base.so"))))
    base.ggml_op_name.restype = ctypes.c_char_p
    name: bytes = base.ggml_op_name(number)
    return name


def widen(source: str, out: str) -> dict[str, Any]:
    """Write the model in float16, unless it is there. It appears only when it is complete."""
    if not Path(out).exists():
        part = Path(f"{out}.{os.getpid()}")
        try:
            requantized(Path(source), part, "F16", None)
            os.replace(part, out)
        finally:
            part.unlink(missing_ok=True)
    return {}


def importance(source: str, tokens: str, threads: int, out: str) -> dict[str, Any]:
    """Evaluate the tokens, and write the mean squares by name (npz)."""
    ids_nT = np.load(tokens, allow_pickle=False)
    meter, seen = Meter(), Importance()
    engine = Engine(llama_cpp, lambda *asked: start(*asked, watch=seen.callback), clear, about)
    engine.use({SOURCE: source})
    said: dict[str, Any] = engine.load(SOURCE, ids_nT.shape[1], threads)
    with meter.work():
        for ids_T in ids_nT:
            engine.evaluate(SOURCE, ids_T.tolist())
        if set(seen.rows.values()) != {ids_nT.size}:
            raise RuntimeError(f"{ids_nT.size} tokens gave the matrices {sorted(set(seen.rows.values()))} inputs")
        means: dict[str, Any] = seen.means()
        np.savez(out, **means)
    return {**meter.answer(), **said, "matrices": len(means)}


def quantize(source: str, importance: str, type: str, threads: int, out: str) -> dict[str, Any]:
    """Quantize a file by llama.cpp's recipe for a type."""
    meter = Meter()
    with meter.work():
        requantized(Path(source), Path(out), type, importance, threads)
    return dict(meter.answer())


if __name__ == "__main__":
    serve({"widen": widen, "importance": importance, "quantize": quantize})
