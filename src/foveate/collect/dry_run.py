"""The dry run: one forward pass that keeps nothing and shows what a forward and backward pass would take.

It counts the bytes that backward would keep, finds the modules that could run twice, and takes the time. The pass runs
with gradients, so that autograd hands over each tensor that it saves. Each tensor is let go as soon as its bytes are
counted, so a model can be measured that does not fit into memory with its gradients. The bytes count for the module
that was running. `DryRun.blocks_within` can then cut a model of any structure into blocks to replay
(`foveate.collect.replay`): the largest modules, from the outside in, of which each keeps no more than is allowed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from foveate.collect.kinds import Kind, QuantizableWeight, kind_of, weight_matrix_shape
from foveate.collect.objectives import Objective, infer, run


@dataclass
class _ModuleUse:
    """What the dry run saw of one module.

    Attributes:
        largest_call: the most bytes that one call keeps.
        total: bytes that all calls of the batch keep.
        input_bytes: bytes of the floating point inputs of all calls.
        repeatable: whether the module may run twice: it changed no input in place, and no call was inside another.
        children: names of the modules that it called.
    """

    largest_call: int = 0
    total: int = 0
    input_bytes: int = 0
    repeatable: bool = True
    children: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class DryRun:
    """What the first batch showed.

    Attributes:
        seconds: duration of the forward pass.
        objective: what the output is for.
        output_bytes: bytes of what the objective compares, as float32.
        samples: number of samples in the batch.
        calls: names of the modules with weights, in the order of their calls.
        rows: for each of these names, how many rows of input its weight was multiplied with.
        largest: bytes of the largest input or output of these modules, as float32.
        uses: what was seen of each module, by name; "" is the model itself.
    """

    seconds: float
    objective: Objective
    output_bytes: int
    samples: int
    calls: tuple[str, ...]
    rows: dict[str, int]
    largest: int
    uses: dict[str, _ModuleUse]

    @property
    def kept(self) -> int:
        """Bytes that backward keeps if nothing is replayed."""
        return self.uses[""].total

    def blocks_within(self, most: int) -> tuple[list[str], int]:
        """(modules to replay so that none keeps more than `most` bytes where possible, bytes that are then kept)."""
        blocks: list[str] = []
        peak = largest = 0

        def kept_within(name: str) -> int:
            """Bytes kept of a module that is not replayed; a replayed child counts with its inputs."""
            nonlocal largest
            use = self.uses[name]
            own = use.total
            for part in sorted(use.children):
                inner = self.uses[part]
                own -= inner.total
                if inner.largest_call <= most and inner.repeatable and inner.total > inner.input_bytes:
                    blocks.append(part)
                    largest = max(largest, inner.largest_call)
                    own += inner.input_bytes
                else:
                    own += kept_within(part)
            return max(own, 0)

        peak = kept_within("")
        return blocks, peak + largest

    def smallest_cut(self) -> tuple[list[str], int]:
        """(the blocks to replay that keep the fewest bytes, the bytes that are then kept)."""
        most = self.kept
        best: tuple[list[str], int] = ([], self.kept)
        while most > 4096:
            most //= 2
            found = self.blocks_within(most)
            if found[1] < best[1]:
                best = found
        return best


def dry_run(model: nn.Module, batch: Any, found: Sequence[QuantizableWeight], objective: Objective | None) -> DryRun:
    """Run one batch through a model and keep nothing.

    The caller has frozen the parameters and put the model into evaluation mode.

    Args:
        model: any module.
        batch: as for `foveate.quantize`.
        found: the weights of the model.
        objective: what the output is for; inferred from the output if not given.
    """
    names = {id(module): name for name, module in model.named_modules()}
    weight_names = {id(m): name for f in found for name, m in zip(f.names, f.modules, strict=True)}
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    uses: dict[str, _ModuleUse] = {}
    running: list[tuple[str, list[Tensor], list[int]]] = []
    saved = [0]  # bytes kept so far by each open call, innermost last
    calls: list[str] = []
    rows: dict[str, int] = {}
    sizes = [0]
    zero = torch.zeros((), requires_grad=True)

    def pack(t: Tensor) -> None:
        if t.untyped_storage().data_ptr() not in known:
            saved[-1] += t.numel() * t.element_size()

    def unpack(_: None) -> Tensor:
        raise AssertionError("a dry run keeps nothing")

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        running.append((names[id(module)], given, [t._version for t in given]))
        saved.append(0)

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        name, given, versions = running.pop()
        kept = saved.pop()
        if id(module) in weight_names:
            size, count = _own_copies(module, given[0])
            kept += size
            own = weight_names[id(module)]
            calls.append(own)
            rows[own] = rows.get(own, 0) + count
            sizes.append(max(size, 4 * output.numel()))
            if isinstance(output, Tensor) and not output.requires_grad:
                output = output + zero
        saved[-1] += kept
        use = uses.setdefault(name, _ModuleUse())
        use.largest_call = max(use.largest_call, kept)
        use.total += kept
        use.input_bytes += sum(t.numel() * t.element_size() for t in given if t.is_floating_point())
        use.repeatable &= versions == [t._version for t in given] and all(name != n for n, _, _ in running)
        if running:
            uses.setdefault(running[-1][0], _ModuleUse()).children.add(name)
        return output

    started = time.perf_counter()
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, unpack))
        output = run(model, batch)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        objective = infer(output) if objective is None else objective
        outcome = objective.outcome(output, batch)
    return DryRun(seconds, objective, 4 * outcome.numel(), len(outcome), tuple(calls), rows, max(sizes), uses)


def _own_copies(module: nn.Module, x: Tensor) -> tuple[int, int]:
    """(bytes of the inputs that calibration copies in a call, rows of its matrix product)."""
    kind = kind_of(module)
    if kind is Kind.EMBEDDING:
        return 0, x.numel()
    columns = weight_matrix_shape(module)[1]
    if kind is Kind.CONV:
        conv: Any = module
        size = 1
        for n, k, s, p, d in zip(
            x.shape[-len(conv.kernel_size) :],
            conv.kernel_size,
            conv.stride,
            conv._reversed_padding_repeated_twice[::-2],
            conv.dilation,
            strict=True,
        ):
            size *= (n + 2 * p - d * (k - 1) - 1) // s + 1
        count = size * conv.groups * (len(x) if x.dim() > 1 + len(conv.kernel_size) else 1)
        return 4 * count * columns, count
    count = x.numel() // max(x.shape[-1], 1)
    return 4 * count * columns, count
