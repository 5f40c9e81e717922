"""Tries one family as a user would: quantize, run at several levels, save and load, generate, dequantize.

The status of the outcome is one of

    works      every weight matrix is on planes
    partly     some weight matrices stay float: which, and what share of all weights
    refused    foveate raised an error of its own
    FAILED     anything else: an exception of another class, or a wrong output
    not tried  the installed transformers could not make or run the float model
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.architectures.families import Family
from foveate.calibrate.dequantize import dequantize
from foveate.calibrate.quantize import quantize
from foveate.collect.objectives import Logits, run
from foveate.errors import FoveateError
from foveate.folder.load import load
from foveate.folder.save import save
from foveate.nn.levels import apply
from foveate.nn.registry import profile_of, registry_of
from foveate.nn.weight import PlaneWeight
from foveate.precision.maps import PrecisionMap

#: Levels that each model is run at, its inputs at 16 bits.
LEVELS = (8, 6, 4, 3, 2)
#: The largest relative difference that rounding may make between outputs that are equal in exact arithmetic.
_SAME = 1e-3


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of trying one family.

    Attributes:
        name, kind: of the family.
        status: `works`, `partly`, `refused`, `FAILED` or `not tried`.
        step: the last step that was begun.
        says: the message of a refusal or a failure; which weights stay float; empty for `works`.
        float_share: the share of the weights (parameters of two dimensions or more) that stays float.
        errors: by level, the relative error of the output.
    """

    name: str
    kind: str
    status: str
    step: str
    says: str = ""
    float_share: float = 0.0
    errors: dict[int, float]


def attempt(family: Family) -> Outcome:
    """Try one family. No exception is raised: it becomes the outcome."""
    trial = _Trial(family)
    try:
        status, says = trial.run()
    except FoveateError as error:
        status, says = "refused", f"{trial.step}: {error}"
    except Exception as error:  # an exception that is not foveate's is a row of the table
        known = trial.step in ("making", "running the float model")
        status, says = "not tried" if known else "FAILED", f"{trial.step}: {type(error).__name__}: {error}"
    return Outcome(
        name=family.name,
        kind=family.kind,
        status=status,
        step=trial.step,
        says=" ".join(says.split())[:400],
        float_share=trial.float_share,
        errors=trial.errors,
    )


class _Trial:
    """The steps of a trial; `step` is the one that was begun last."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.step = "making"
        self.float_share = 0.0
        self.errors: dict[int, float] = {}

    def run(self) -> tuple[str, str]:
        family = self.family
        model = self._made()
        batch = family.batch(7)
        self.step = "running the float model"
        before = _outputs(model, batch)
        self.step = "quantizing"
        objective = Logits() if family.skeleton else None
        quantize(model, [family.batch(1), family.batch(2)], objective=objective, progress=False)
        floats = _left_float(model)
        self.float_share = sum(floats.values()) / max(1, sum(floats.values()) + _on_planes(model))
        self.step = "running at each level"
        profile = profile_of(model)
        for level in LEVELS:
            apply(model, profile.uniform(level, 16))
            after = _outputs(model, batch)
            self.errors[level] = _distance(after, before)
            if not all(bool(t.isfinite().all()) for t in after if t.is_floating_point()):
                return "FAILED", f"outputs at {level} bits are not finite"
        self._saved_and_loaded(model, profile.uniform(4), batch)
        if family.generates:
            self.step = "writing"
            prompt = {key: t[:1] for key, t in batch.items() if not key.startswith("decoder_")}
            cast(Any, model).generate(**prompt, max_new_tokens=4, do_sample=False)
        self.step = "going back"
        apply(model, profile.uniform(4, 32))
        expected = _outputs(model, batch)
        dequantize(model)
        if _distance(_outputs(model, batch), expected) > _SAME:
            return "FAILED", "outputs after dequantize are not those at the same levels"
        if not floats:
            return "works", ""
        return "partly", _listed(floats)

    def _made(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.family.make().eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.dim() in (2, 4) and "embed" not in name:  # weights that start near 0 would hide every error
                    nn.init.normal_(p, std=p[0].numel() ** -0.5)
        return model

    def _saved_and_loaded(self, model: nn.Module, plan: PrecisionMap, batch: Any) -> None:
        self.step = "saving and loading"
        apply(model, plan)
        expected = _outputs(model, batch)
        with tempfile.TemporaryDirectory() as folder:
            save(model, Path(folder) / "model")
            again = load(Path(folder) / "model", model=self._made() if self.family.skeleton else None)
        difference = _distance(_outputs(again, batch), expected)
        if difference:
            raise RuntimeError(f"the loaded model's outputs differ by {difference:.2g}")


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    with torch.no_grad():
        torch.manual_seed(0)
        output = run(model, batch)
    tensors: list[Tensor] = []
    _walk(output, tensors.append)
    return [t.detach().clone() for t in tensors if t.is_floating_point()]


def _walk(value: Any, take: Callable[[Tensor], None]) -> None:
    """Pass the tensors of an output to `take`, in order. Caches of keys and values are not outputs."""
    if isinstance(value, Tensor):
        take(value)
    elif isinstance(value, dict):
        for entry in value.values():
            _walk(entry, take)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            _walk(entry, take)


def _distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The relative error of the first output."""
    return float((actual[0].float() - expected[0].float()).norm() / expected[0].float().norm().clamp_min(1e-20))


def _on_planes(model: nn.Module) -> int:
    return sum(w.value.rows * w.value.columns for w in registry_of(model).weights.values())


def _left_float(model: nn.Module) -> Counter[str]:
    """How many values of weights are not on planes, by name (`*` for numbers) and class of module."""
    left: Counter[str] = Counter()
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, PlaneWeight):
            continue
        for name, p in module._parameters.items():
            if p is not None and p.dim() > 1 and id(p) not in seen and min(p.shape[:1]) > 1:
                seen.add(id(p))
                where = re.sub(r"\.\d+\b", ".*", f"{prefix}.{name}".lstrip("."))
                left[f"`{where}` ({type(module).__name__})"] += p.numel()
    return left


def _listed(floats: Counter[str]) -> str:
    most = [name for name, _ in floats.most_common(3)]
    return ", ".join(most) + (f" and {len(floats) - 3} more" if len(floats) > 3 else "")
