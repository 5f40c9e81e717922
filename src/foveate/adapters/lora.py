"""LoraOnPlanes: peft's LoRA layer around a layer on planes. Importing this module needs peft."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import Linear
from torch import nn

from foveate.errors import FoveateError


class LoraOnPlanes(Linear):
    """`y = planes(x) + scaling * B(A(dropout(x)))`.

    Gradients pass through the planes as through a weight that is not trained. Merging is refused, because planes hold
    codes, to which nothing can be added. After `foveate.dequantize` the base layer is a plain one, and merging works.
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[Any, Any]:
        return module.in_features, module.out_features

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> None:
        """Refuse all variants but plain LoRA."""
        variant = super().resolve_lora_variant(config=config, **kwargs)
        if variant is not None:
            raise FoveateError(f"{type(variant).__name__} needs the dense weight: planes take plain LoRA only")
