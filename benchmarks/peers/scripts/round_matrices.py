"""Matrices rounded by hqq, optimum-quanto, torchao, llama.cpp and gptqmodel, and returned as float32.

It runs with the Python that has the library. A request names two files of numpy arrays: the weights, float32 [N, K] by
name, and the second moments of their inputs, float32 [K, K] by the same names. The matrices returned are the library's
format dequantized, so they can be put into the float model.

    {"do": "round", "form": "hqq", "bits": 4, "group": 64, "axis": 1, "weights": FILE, "moments": FILE, "out": FILE}
    ->  {"bytes": of codes, scales and zero points, "version": of the library}

Codes count exactly `bits` each, even where a library leaves gaps between them (hqq at 3 bits) or does not pack them
(torchao). Zero points that are codes count as codes. So no peer is charged for bytes that better packing would save.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from answers import serve

Matrix = np.ndarray[Any, Any]
# llama.cpp's types by their numbers in ggml.h
_GGML = {"Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ4_NL": 20, "IQ3_S": 21, "IQ2_S": 22}
_GGML |= {"IQ4_XS": 23}
_SUPER_BLOCK = 256


def packed(bits: int, count: int) -> int:
    """The bytes of `count` codes."""
    return -(-bits * count // 8)


def divisor(columns: int, group: int) -> int:
    """The largest group up to `group` that divides a row."""
    return max(g for g in range(1, min(group, columns) + 1) if columns % g == 0)


def hqq(w_NK: Matrix, _: Matrix, bits: int, group: int, axis: int) -> tuple[Matrix, int]:
    """Half-quadratic quantization, its own optimizer; scale and zero point in float16. Groups run on over rows."""
    import torch
    from hqq.core.quantize import Quantizer

    size = divisor(w_NK.size, group)
    codes, meta = Quantizer.quantize(
        torch.from_numpy(w_NK), nbits=bits, group_size=size, axis=axis, bitpack=False, device="cpu"
    )
    held = {"scale": meta["scale"].half().float(), "zero": meta["zero"].half().float()}
    dense = Quantizer.dequantize(codes.float(), {**meta, **held, "compute_dtype": torch.float32})
    scales = meta["scale"].numel() + meta["zero"].numel()
    return dense.numpy(), packed(bits, w_NK.size) + 2 * scales


def quanto(w_NK: Matrix, _: Matrix, bits: int, group: int, optimizer: str) -> tuple[Matrix, int]:
    """qint2 and qint4 with quanto's own choice of a group up to `group`, scale and shift in float16."""
    import torch
    from optimum.quanto import HqqOptimizer, MaxOptimizer, qint2, qint4
    from optimum.quanto.tensor.weights import quantize_weight

    columns = w_NK.shape[1]
    size = group if columns % group == 0 else divisor(columns, group)
    chosen = {2: qint2, 4: qint4}[bits]
    weight = torch.from_numpy(w_NK).half()
    maker = {"hqq": HqqOptimizer, "max": MaxOptimizer}[optimizer]()
    scale, shift = maker(weight, qtype=chosen, axis=0, group_size=size)
    made = quantize_weight(weight, qtype=chosen, axis=0, scale=scale, shift=shift, group_size=size, optimized=False)
    return made.dequantize().float().numpy(), packed(bits, w_NK.size) + 2 * (scale.numel() + shift.numel())


def torchao(w_NK: Matrix, _: Matrix, bits: int, group: int, algorithm: str) -> tuple[Matrix, int]:
    """IntxWeightOnlyConfig: asymmetric, float16 scales; zero points are codes, and there are none with hqq's scales."""
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
    from torchao.quantization.quant_primitives import MappingType
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

    rows, columns = w_NK.shape
    size = divisor(columns, group)
    layer = torch.nn.Linear(columns, rows, bias=False)
    layer.weight = torch.nn.Parameter(torch.from_numpy(w_NK), requires_grad=False)
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(size),
        mapping_type=MappingType.ASYMMETRIC,
        scale_dtype=torch.float16,
        intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm[algorithm],
    )
    quantize_(layer, config)
    held: Any = layer.weight
    zeros = packed(bits, held.zero_point.numel()) if algorithm == "AFFINE" else 0
    dense = held.dequantize().float().numpy()
    return dense, packed(bits, w_NK.size) + 2 * held.scale.numel() + zeros


def gptqmodel(w_NK: Matrix, moment_KK: Matrix, bits: int, group: int, mse: float) -> tuple[Matrix, int]:
    """GPTQ, asymmetric, float16 scales, columns in its own order; `mse` is the norm of its clip search, 0 for none.

    Its inputs are rows with the given second moments, which is all that it uses of its inputs.
    """
    import torch
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    rows, columns = w_NK.shape
    layer = torch.nn.Linear(columns, rows, bias=False)
    layer.weight = torch.nn.Parameter(torch.from_numpy(w_NK.copy()), requires_grad=False)
    config = QuantizeConfig(bits=bits, group_size=min(group, columns), sym=False, desc_act=False, mse=mse)
    work = GPTQ(layer, config)
    work.quantizer.configure(perchannel=True)
    values, vectors = np.linalg.eigh(moment_KK.astype(np.float64))
    x_KK = (np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T * np.sqrt(columns)).astype(np.float32)
    x_1KK = torch.from_numpy(np.ascontiguousarray(x_KK))[None]
    work.add_batch(x_1KK, x_1KK @ layer.weight.T)
    dense, scale = work.quantize()[:2]
    groups = scale.numel()
    return dense.float().numpy(), packed(bits, w_NK.size) + 2 * groups + packed(bits, groups)


def llama_cpp(w_NK: Matrix, moment_KK: Matrix, type: str, ragged: str) -> tuple[Matrix, int]:
    """A type of llama.cpp, with the inputs' mean squares as its importance matrix.

    Rows that are no multiple of 256 are padded with zeros, which are counted, or rounded to another type (`ragged`).
    """
    import llama_cpp as library

    base = ctypes.CDLL(str(next(Path(library.__file__).parent.glob("lib/libggml-base.so"))))
    kind = ragged if w_NK.shape[1] % _SUPER_BLOCK and ragged else type
    block = 32 if kind == "IQ4_NL" else _SUPER_BLOCK
    missing = -w_NK.shape[1] % block
    w_NK = np.ascontiguousarray(np.pad(w_NK, ((0, 0), (0, missing))), dtype=np.float32)
    energy_K = np.pad(np.diagonal(moment_KK), (0, missing)).astype(np.float32)
    energy_K = np.ascontiguousarray(np.maximum(energy_K, energy_K.mean() * np.float32(1e-6)))
    rows, columns = w_NK.shape
    base.ggml_row_size.restype = ctypes.c_size_t
    size = base.ggml_row_size(_GGML[kind], ctypes.c_int64(columns)) * rows
    codes = np.zeros(size, np.uint8)
    floats = ctypes.POINTER(ctypes.c_float)
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    base.ggml_quantize_chunk(
        _GGML[kind],
        w_NK.ctypes.data_as(floats),
        codes.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(0),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        energy_K.ctypes.data_as(floats),
    )
    dense = np.empty_like(w_NK)
    back = getattr(base, f"dequantize_row_{kind.lower() if kind.startswith('IQ') else kind.replace('Q', 'q')}")
    back(codes.ctypes.data_as(ctypes.c_void_p), dense.ctypes.data_as(floats), ctypes.c_int64(dense.size))
    return dense[:, : columns - missing], size


#: By form: the function that rounds one matrix, and the package whose version is reported.
FORMS: dict[str, tuple[Callable[..., tuple[Matrix, int]], str]] = {
    "hqq": (hqq, "hqq"),
    "quanto": (quanto, "optimum-quanto"),
    "torchao": (torchao, "torchao"),
    "gptqmodel": (gptqmodel, "gptqmodel"),
    "llama.cpp": (llama_cpp, "llama-cpp-python"),
}


def round_all(form: str, weights: str, moments: str, out: str, **settings: Any) -> dict[str, Any]:
    """Round every matrix of a file and write what came out."""
    rounds, package = FORMS[form]
    dense: dict[str, Matrix] = {}
    total = 0
    with np.load(weights, allow_pickle=False) as held, np.load(moments, allow_pickle=False) as seen:
        for name in held.files:
            dense[name], size = rounds(held[name], seen[name], **settings)
            total += size
    arrays: dict[str, Any] = dict(dense)
    np.savez(out, **arrays)
    return {"bytes": total, "version": metadata.version(package)}


if __name__ == "__main__":
    serve({"round": round_all})
