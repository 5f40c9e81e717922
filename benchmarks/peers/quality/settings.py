"""What each peer is asked for at about 4.25, 3.25 and 2.5 bits a weight: its settings that come closest.

A setting's bytes are known when it has run. Ours is then given exactly as many, so a setting need not hit its point;
one that misses it by more than `WINDOW` bits (widths that its groups do not divide) is left out, and a note says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Bits a weight, scales and zero points counted, by what figures call them.
POINTS = {"b4_25": 4.25, "b3_25": 3.25, "b2_5": 2.5}
WINDOW = 0.2
#: Our own rounding for one level only, in place of the peers that have none for convolutions.
STAND_IN = "one level"
#: Of auto-round: iterations a block and learning rate, those of its own light recipe.
AUTO_ROUND = {"iterations": 50, "learning_rate": 5e-3}


@dataclass(frozen=True)
class Setting:
    """One setting of one peer.

    Attributes:
        peer: the library, as the scripts call it.
        environment: that has it.
        point: of `POINTS`.
        arguments: what its script is given.
        whole: whether it rounds whole transformers, not matrices.
    """

    peer: str
    environment: str
    point: str
    arguments: Mapping[str, Any]
    whole: bool = False

    @property
    def script(self) -> str:
        """The file that does it."""
        return "round_models.py" if self.whole else "round_matrices.py"

    @property
    def name(self) -> str:
        """Its settings in a few words."""
        return " ".join(f"{v}" if isinstance(v, str) else f"{k} {v}" for k, v in self.arguments.items() if v != "")


def _settings() -> tuple[Setting, ...]:
    found = []
    for point, bits, group in (("b4_25", 4, 128), ("b3_25", 3, 128), ("b2_5", 2, 64)):
        found += [Setting("hqq", "hqq", point, {"bits": bits, "group": group, "axis": axis}) for axis in (0, 1)]
    for point, bits, group in (("b4_25", 4, 128), ("b2_5", 2, 64)):
        for optimizer in ("max", "hqq"):
            arguments = {"bits": bits, "group": group, "optimizer": optimizer}
            found.append(Setting("quanto", "quanto", point, arguments))
    for point, bits, group, algorithm in (
        ("b4_25", 4, 128, "AFFINE"),
        ("b4_25", 4, 64, "HQQ_SCALE_ONLY"),
        ("b3_25", 3, 64, "AFFINE"),
        ("b3_25", 3, 64, "HQQ_SCALE_ONLY"),
        ("b2_5", 2, 32, "AFFINE"),
        ("b2_5", 2, 32, "HQQ_SCALE_ONLY"),
    ):
        found.append(Setting("torchao", "torchao", point, {"bits": bits, "group": group, "algorithm": algorithm}))
    for point, bits, group, mse in (
        ("b4_25", 4, 128, 0.0),
        ("b4_25", 4, 128, 2.4),
        ("b3_25", 3, 128, 2.4),
        ("b3_25", 3, 64, 2.4),
        ("b2_5", 2, 64, 2.4),
        ("b2_5", 2, 32, 2.4),
    ):
        found.append(Setting("gptqmodel", "gptqmodel", point, {"bits": bits, "group": group, "mse": mse}))
    for point, kind, ragged in (
        ("b4_25", "IQ4_XS", "IQ4_NL"),
        ("b4_25", "IQ4_XS", ""),
        ("b3_25", "IQ3_XXS", ""),
        ("b3_25", "IQ3_XXS", "IQ4_NL"),
        ("b2_5", "IQ2_S", ""),
        ("b2_5", "Q2_K", ""),
    ):
        found.append(Setting("llama.cpp", "llama-cpp", point, {"type": kind, "ragged": ragged}))
    for point, bits, group in (("b4_25", 4, 128), ("b3_25", 3, 64), ("b2_5", 2, 32)):
        found.append(
            Setting("auto-round", "auto-round", point, {"bits": bits, "group": group, **AUTO_ROUND}, whole=True)
        )
    return tuple(found)


SETTINGS = _settings()
