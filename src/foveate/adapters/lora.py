"""peft's LoRA layer around a layer on planes; importing it needs peft."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import Linear
from torch import nn

from foveate.errors import FoveateError


class LoraOnPlanes(Linear):
    """`y = planes(x) + scaling * B(A(dropout(x)))`.

    Gradients go through the planes as through a weight that is not trained. Merging is refused: planes hold codes, and
    nothing can be added to those. After `foveate.dequantize` the layer beneath is a plain one and merging works.
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[Any, Any]:
        return module.in_features, module.out_features

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> None:
        """Refuse all but plain LoRA."""
        variant = super().resolve_lora_variant(config=config, **kwargs)
        if variant is not None:
            raise FoveateError(f"{type(variant).__name__} needs the dense weight: planes take plain LoRA only")
