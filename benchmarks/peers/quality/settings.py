"""The settings of each peer that come closest to 4.25, 3.25 and 2.5 bits per weight.

A setting's bytes are known only after it has run. Our map is then given exactly as many bytes, so a setting need not
hit its point. A setting that misses it by more than `WINDOW` bits (where its groups do not divide the widths) is left
out, and a note says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Bits per weight, scales and zero points counted, by their name in figures.
POINTS = {"b4_25": 4.25, "b3_25": 3.25, "b2_5": 2.5}
WINDOW = 0.2
#: Our own rounding for one level only. It replaces peers for convolutions, which most of them do not support.
STAND_IN = "one level"
#: auto-round's iterations per block and learning rate, as in its own light recipe.
AUTO_ROUND = {"iterations": 50, "learning_rate": 5e-3}


@dataclass(frozen=True)
class Setting:
    """One setting of one peer.

    Attributes:
        peer: the library, as the scripts call it.
        environment: the environment that has it.
        point: a name in `POINTS`.
        arguments: the arguments of its script.
        whole: whether it rounds whole transformers, not matrices.
    """

    peer: str
    environment: str
    point: str
    arguments: Mapping[str, Any]
    whole: bool = False

    @property
    def script(self) -> str:
        """The script that rounds with this setting."""
        return "round_models.py" if self.whole else "round_matrices.py"

    @property
    def name(self) -> str:
        """The arguments in a few words."""
        return " ".join(f"{v}" if isinstance(v, str) else f"{k} {v}" for k, v in self.arguments.items() if v != "")


def _settings() -> tuple[Setting, ...]:
    settings = []
    for point, bits, group in (("b4_25", 4, 128), ("b3_25", 3, 128), ("b2_5", 2, 64)):
        settings += [Setting("hqq", "hqq", point, {"bits": bits, "group": group, "axis": axis}) for axis in (0, 1)]
    for point, bits, group in (("b4_25", 4, 128), ("b2_5", 2, 64)):
        for optimizer in ("max", "hqq"):
            arguments = {"bits": bits, "group": group, "optimizer": optimizer}
            settings.append(Setting("quanto", "quanto", point, arguments))
    for point, bits, group, algorithm in (
        ("b4_25", 4, 128, "AFFINE"),
        ("b4_25", 4, 64, "HQQ_SCALE_ONLY"),
        ("b3_25", 3, 64, "AFFINE"),
        ("b3_25", 3, 64, "HQQ_SCALE_ONLY"),
        ("b2_5", 2, 32, "AFFINE"),
        ("b2_5", 2, 32, "HQQ_SCALE_ONLY"),
    ):
        settings.append(Setting("torchao", "torchao", point, {"bits": bits, "group": group, "algorithm": algorithm}))
    for point, bits, group, mse in (
        ("b4_25", 4, 128, 0.0),
        ("b4_25", 4, 128, 2.4),
        ("b3_25", 3, 128, 2.4),
        ("b3_25", 3, 64, 2.4),
        ("b2_5", 2, 64, 2.4),
        ("b2_5", 2, 32, 2.4),
    ):
        settings.append(Setting("gptqmodel", "gptqmodel", point, {"bits": bits, "group": group, "mse": mse}))
    for point, kind, ragged in (
        ("b4_25", "IQ4_XS", "IQ4_NL"),
        ("b4_25", "IQ4_XS", ""),
        ("b3_25", "IQ3_XXS", ""),
        ("b3_25", "IQ3_XXS", "IQ4_NL"),
        ("b2_5", "IQ2_S", ""),
        ("b2_5", "Q2_K", ""),
    ):
        settings.append(Setting("llama.cpp", "llama-cpp", point, {"type": kind, "ragged": ragged}))
    for point, bits, group in (("b4_25", 4, 128), ("b3_25", 3, 64), ("b2_5", 2, 32)):
        settings.append(
            Setting("auto-round", "auto-round", point, {"bits": bits, "group": group, **AUTO_ROUND}, whole=True)
        )
    return tuple(settings)


SETTINGS = _settings()
