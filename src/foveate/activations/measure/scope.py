"""Where a saved tensor comes from: the module that is running, the torch function it calls, and which of its calls.

Autograd's pack hook gets a tensor and no name. So while a `Scope` is active, a `TorchFunctionMode` sees each torch
function as it is called (about 1 us each), and global forward hooks see modules come and go. A site is named by what
does not change between steps: `layers.0.mlp:saved.silu.0.0` is the first tensor that the first call of `silu` keeps in
one call of the module `layers.0.mlp`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

#: Functions that save nothing and are called often: no `Call` is made for them.
_PLAIN = frozenset(
    [
        "__get__",
        "__set__",
        "size",
        "dim",
        "stride",
        "numel",
        "view",
        "reshape",
        "transpose",
        "permute",
        "contiguous",
        "__getitem__",
        "unsqueeze",
        "squeeze",
        "expand",
        "detach",
        "item",
        "is_floating_point",
        "chunk",
        "split",
        "flatten",
    ]
)
#: The name of what runs outside the model, the loss usually.
OUTSIDE = "outside"
#: The name of modules with parameters of other models: what they save is kept exactly, since no audit sees it.
FOREIGN = "foreign"


@dataclass
class Call:
    """One call of a torch function.

    Attributes:
        function: its `__name__`.
        callable: the function itself.
        args, kwargs: what it was called with.
        frame: the module call that it belongs to.
        packed: what was saved during it, in order (whatever the store puts there).
        tensors: of a call of attention, the tensors that it saved, in order, while it runs.
        attention: of a call of attention, how it is run again, if it is.
        occurrence: how many calls of the function in this frame saved something before it; -1 until it saves.
        count: of tensors that it has saved.
    """

    function: str
    callable: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    frame: Frame
    packed: list[Any] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    attention: Any = None
    occurrence: int = -1
    count: int = 0

    def next_name(self) -> str:
        """The name of the next tensor that this call saves."""
        if self.occurrence < 0:
            self.occurrence = self.frame.seen.get(self.function, 0)
            self.frame.seen[self.function] = self.occurrence + 1
        name = f"{self.frame.module}:saved.{self.function}.{self.occurrence}.{self.count}"
        self.count += 1
        return name


@dataclass
class Frame:
    """One call of a module: its dotted name, and how often each function has saved something in it."""

    module: str
    seen: dict[str, int] = field(default_factory=dict)


def _nothing() -> None:
    """The default of `Scope.between`."""


class Scope(TorchFunctionMode):
    """Knows, while it is active, which module and function is running.

    Args:
        model: whose modules have names.
        on_backward: called instead of `Tensor.backward` and `torch.autograd.backward`, with the function and its
            arguments.
        on_called: called after a torch function that saved something, with its `Call` and what it returned.
        watched: functions after which it is called in any case.

    Attributes:
        between: called before each function.
    """

    def __init__(
        self,
        model: nn.Module,
        on_backward: Callable[[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], Any],
        on_called: Callable[[Call, Any], None],
        watched: frozenset[str],
    ) -> None:
        super().__init__()
        self._names = {id(module): name or "model" for name, module in model.named_modules()}
        self._own = {id(parameter) for parameter in model.parameters()}
        self._foreign: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
        self._model = model  # keeps the ids above from being given to others
        self._on_backward, self._on_called, self.watched = on_backward, on_called, watched
        self._frames = [Frame(OUTSIDE)]
        self._call: Call | None = None
        self._handles: list[RemovableHandle] = []
        self.between: Callable[[], None] = _nothing
        self._thread = 0  # hooks of modules run in all threads, modes in one

    @property
    def call(self) -> Call:
        """The function that is running; one without a name where there is none (a custom autograd function)."""
        if self._call is None:
            return Call("function", torch.empty, (), {}, self._frames[-1])
        return self._call

    def restart(self) -> None:
        """Count the calls outside the model from the first again: a new step begins."""
        self._frames[0].seen.clear()

    def __enter__(self) -> Scope:
        self._frames, self._call = [Frame(OUTSIDE)], None
        self._thread = threading.get_ident()
        self._handles = [
            nn.modules.module.register_module_forward_pre_hook(self._entered),
            nn.modules.module.register_module_forward_hook(self._left, always_call=True),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def _name_of(self, module: nn.Module) -> str | None:
        """A module's name; FOREIGN if it holds parameters that are not the model's, and none of its own."""
        name = self._names.get(id(module))
        if name is None:
            foreign = self._foreign.get(module)
            if foreign is None:
                foreign = self._foreign[module] = any(id(p) not in self._own for p in module.parameters())
            name = FOREIGN if foreign else None
        return name

    def _entered(self, module: nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling():
            return
        name = self._name_of(module)
        if name is not None and self._thread == threading.get_ident():
            self._frames.append(Frame(name))

    def _left(self, module: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        name = self._name_of(module)
        mine = len(self._frames) > 1 and self._frames[-1].module == name and self._thread == threading.get_ident()
        if name is not None and mine:
            self._frames.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # a compiled function saves under its own node: see compiled.py
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _PLAIN:
            return func(*args, **kwargs)
        if func is torch.Tensor.backward or func is torch.autograd.backward:
            return self._on_backward(func, args, kwargs)
        self.between()
        outer, self._call = self._call, Call(name, func, args, kwargs, self._frames[-1])
        try:
            result = func(*args, **kwargs)
            if self._call.packed or name in self.watched:
                self._on_called(self._call, result)
        finally:
            self._call = outer
        return result
