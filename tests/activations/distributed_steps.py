"""One process of two that train one model: started by test_safety_distributed.py.

Arguments: the rank, a file where the processes meet, and what to run. Every check is an assertion.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import foveate as fv


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2)]
    return nn.Sequential(*blocks, nn.Linear(32, 4))


def _loss(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    x = torch.randn(24, 32, generator=generator)
    return F.cross_entropy(model(x), x[:, :4].argmax(1))


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


def _train(model: nn.Module, store: Any, steps: int) -> tuple[list[Tensor], float, float]:
    """Gradients of the first step, and the losses of the first and the last."""
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    first: list[Tensor] = []
    losses = []
    for step in range(steps):
        if store is None:
            loss = _loss(model, step)
            loss.backward()
        else:
            with store:
                loss = _loss(model, step)
                loss.backward()
        first = first or [_full(p.grad).clone() for p in model.parameters() if p.grad is not None]
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return first, losses[0], losses[-1]


def _wrapped(kind: str) -> nn.Module:
    model = _model()
    if kind == "fsdp":
        for block in model:
            fully_shard(block, mesh=_mesh())
        return fully_shard(model, mesh=_mesh())
    return DistributedDataParallel(
        model, find_unused_parameters=kind == "ddp_unused", static_graph=kind == "ddp_static"
    )


def _mesh() -> Any:
    return dist.device_mesh.init_device_mesh("cpu", (2,))


def check(kind: str, rank: int) -> None:
    """Exact gradients at 32 bits; training at 8; and processes that measure at different steps."""
    wanted, before, after = _train(_wrapped(kind), None, 30)
    exact = _wrapped(kind)
    found, *_ = _train(exact, fv.compress_activations(exact, levels=32, options=fv.ActivationOptions(smallest=1)), 3)
    assert len(wanted) == len(found) == 14
    assert all(map(torch.equal, wanted, found))
    lossy = _wrapped(kind)
    _, _, reached = _train(
        lossy, fv.compress_activations(lossy, levels=4, options=fv.ActivationOptions(smallest=1, seed=rank)), 30
    )
    assert reached < before - 0.5 * (before - after), (before, after, reached)
    measured = _wrapped(kind)
    inner = measured.module if isinstance(measured, DistributedDataParallel) else measured
    store = fv.compress_activations(
        inner, error=0.2, options=fv.ActivationOptions(smallest=1, audit_every=2 + rank, profile_every=3 + rank)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where errors cannot be measured the store says so
        _, _, reached = _train(measured, store, 30)
    assert reached < before - 0.5 * (before - after), (before, after, reached)
    assert bool(store.audits) == (kind in ("ddp", "ddp_static"))
    dist.barrier()


def main(rank: int, meeting: str, kinds: list[str]) -> None:
    """Every kind in turn; each that passed is printed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for kind in kinds:
        check(kind, rank)
        print(f"passed: {kind}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
