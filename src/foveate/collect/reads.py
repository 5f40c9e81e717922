"""Find the weights that a model reads outside of their own modules.

A module on planes is called like the module that it replaces, but its weight is no tensor any more. So a weight can be
put on planes only where nothing but its own module's forward reads it. The code of a model can read it elsewhere:
`x @ self.head.weight.t()`, a convolution's weight handed to a kernel, a norm of a weight. While the model runs, a
`TorchFunctionMode` sees every torch function that is given a parameter, and the call stack says whose code called it:

    Linear.forward of a module that holds the weight    a use that planes can take over
    any other code                                      a read outside of the module: the weight stays float

Compiled parts run as plain Python meanwhile, so that the stack shows them. Scripted functions hand weights on where no
mode sees them; such reads are found when the model first runs on planes (`foveate.calibrate.trial`).
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from foveate.collect.kinds import QuantizableWeight, without_product

#: Attributes that a weight on planes has as a parameter does.
ANSWERED = frozenset({"shape", "dtype", "device"})
_CALL: CodeType = nn.Module._call_impl.__code__


class Reads:
    """Collects the weights that are read outside of their modules while `watching` is open.

    Attributes:
        past: by the first name of each such weight, who read it: the function, and the module whose forward called it.
    """

    past: dict[str, str]

    def __init__(self, model: nn.Module, found: Iterable[QuantizableWeight]) -> None:
        self.past = {}
        modules = dict(model.named_modules())
        self._names = {id(module): name for name, module in modules.items()}
        # for each product the class that has a forward around it, and the classes that were seen to call their products
        names = {name: without_product(name) for name in modules}
        self._around = {id(modules[name]): type(modules[outer]) for name, outer in names.items() if outer != name}
        self._ran: set[type[nn.Module]] = set()
        self._weights: dict[int, tuple[str, set[int]]] = {}  # by the parameter: its name, the modules that hold it
        self._forwards: set[CodeType] = set()  # the code of the forwards that planes take over
        for entry in found:
            self._weights[id(entry.modules[0].weight)] = (entry.names[0], set(map(id, entry.modules)))
            self._forwards |= {type(module).forward.__code__ for module in entry.modules}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record what reads weights while this is open."""
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # else nothing can have been compiled, and importing it takes seconds
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(_Mode(self))
            yield

    def only_own(self, found: Sequence[QuantizableWeight]) -> list[QuantizableWeight]:
        """The weights that nothing but their modules was seen to read."""
        return [entry for entry in found if entry.names[0] not in self.past]

    def never_ran(self, found: Sequence[QuantizableWeight]) -> list[QuantizableWeight]:
        """The weights of which a module has a forward of its own that was not seen to call the one of its base."""
        unknown = {product for product, kind in self._around.items() if kind not in self._ran}
        return [entry for entry in found if any(id(module) in unknown for module in entry.modules)]

    def report(self) -> dict[str, Any]:
        """What was seen so far, as values that JSON has, for `take` of the same model's reads in another process."""
        return {"past": self.past, "ran": [i for i, kind in enumerate(self._around.values()) if kind in self._ran]}

    def take(self, reports: Sequence[Mapping[str, Any]]) -> None:
        """Take what several processes saw, this one included; of several readers of a weight the first stays."""
        kinds = list(self._around.values())
        self._ran = {kinds[i] for report in reports for i in report["ran"]}
        self.past = {name: who for report in reversed(reports) for name, who in report["past"].items()}

    def _see(self, func: Any, parts: Iterable[Any]) -> None:
        for part in parts:
            if isinstance(part, Tensor):
                known = self._weights.get(id(part))
                if known is not None and not _is_answered(func):
                    self._judge(func, *known)
            elif isinstance(part, (tuple, list)):
                self._see(func, part)

    def _judge(self, func: Any, name: str, owners: set[int]) -> None:
        frame: FrameType | None = sys._getframe(3)
        reader: nn.Module | None = None
        while frame is not None and reader is None:
            code = frame.f_code
            if code in self._forwards and id(owner := frame.f_locals.get("self")) in owners:
                if id(owner) in self._around:
                    self._ran.add(self._around[id(owner)])
                return
            if code is _CALL:
                reader = frame.f_locals["self"]
            elif str(frame.f_globals.get("__name__")).startswith("foveate.") and frame.f_globals is not globals():
                return  # foveate itself, which takes statistics
            frame = frame.f_back
        where = "the model" if reader is None else self._names.get(id(reader), "") or type(reader).__name__
        self.past.setdefault(name, f"{_name_of(func)} in {where}")


class _Mode(TorchFunctionMode):
    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._reads._see(func, args)
        if kwargs:
            self._reads._see(func, kwargs.values())
        return func(*args, **(kwargs or {}))


def _is_answered(func: Any) -> bool:
    """Whether a function asks for an attribute that a weight on planes has too."""
    return getattr(func, "__name__", "") == "__get__" and getattr(func.__self__, "__name__", "") in ANSWERED


def _name_of(func: Any) -> str:
    name = getattr(func, "__name__", repr(func))
    return str(getattr(func.__self__, "__name__", name)) if name in ("__get__", "__set__") else str(name)


def running(model: nn.Module, error: BaseException) -> str:
    """The innermost module of a model that an error came from, by name; the model's class if that is not known."""
    names = {id(module): name for name, module in model.named_modules()}
    calls = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code is _CALL]
    known = [names[id(module)] for module in calls if names.get(id(module))]
    return known[-1] if known else type(model).__name__


def decode(model: nn.Module) -> None:
    """Let a generative model of transformers generate two tokens; any other model is not run.

    With its cache filled, a model can take other branches of its code, and read other weights, than on a batch.
    """
    generators: Iterator[Any] = (m for m in model.modules() if callable(getattr(m, "can_generate", None)))
    generator = next((m for m in generators if m.can_generate()), None)
    if generator is None or getattr(generator, "main_input_name", "") != "input_ids":
        return
    ids = torch.zeros(1, 4, dtype=torch.long)
    generator.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=2,
        min_new_tokens=2,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=0,
    )
