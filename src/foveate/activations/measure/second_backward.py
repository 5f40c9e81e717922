"""Whether backward can be run a second time for a measurement.

An extra pass must not communicate. The processes of one training may measure at different steps, and a collective that
only one of them calls never returns. So the graph is searched before the first pass. Errors are not measured if a node
communicates with other processes, or cannot run twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

#: Parts of the names of nodes whose backward calls collectives: FSDP, DDP's static graph, tensor parallelism.
_COLLECTIVE = (
    *("RegisterPostBackward", "FSDP", "DDPSink", "AllReduce", "AllGather", "ReduceScatter", "AllToAll", "Broadcast"),
    *(
        "_Reduce",
        "_Scatter",
        "_Gather",
        "Redistribute",
        "ToTorchTensor",
        "FromTorchTensor",
        "WaitTensor",
        "CppNode_c10d",
    ),
)
#: A checkpoint that runs forward in its backward, and refuses `torch.autograd.grad`.
_REENTRANT = "CheckpointFunctionBackward"


def can_run_twice(roots: Sequence[Tensor], parameters: Sequence[Tensor]) -> bool:
    """Whether backward from some roots can be run again without harm; warns if not.

    Args:
        roots: of the backward.
        parameters: whose gradients would be compared.
    """
    reason = "no parameter of the model is an ordinary tensor" if not parameters else _hindrance(roots)
    if reason:
        warnings.warn(
            f"errors of gradients cannot be probed or audited: {reason}; levels stay as they are",
            RuntimeWarning,
            stacklevel=2,
        )
    return not reason


def _hindrance(roots: Sequence[Tensor]) -> str:
    pending: list[Node | None] = [root.grad_fn for root in roots]
    seen: set[Node] = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name()
        if name == _REENTRANT:
            return "a checkpoint is reentrant (use_reentrant=False has no such limit)"
        if torch.distributed.is_available() and any(part in name for part in _COLLECTIVE):
            return f"{name} may wait for other processes"
        pending += [following for following, _ in node.next_functions]
    return ""
