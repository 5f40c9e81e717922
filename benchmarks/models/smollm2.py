"""SmolLM2-135M as a case, from the folder in which the comparison with llama.cpp keeps it quantized.

Its weights stand on a grid of 4 bits before foveate rounds them, so figures of 4 bits and more say nothing of the model
as it was trained.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from benchmarks.models.cases import Case, token_losses
from benchmarks.peers.equal_quality import subject as subjects
from foveate.collect.objectives import Logits
from foveate.precision.profiles import Profile

#: Held-out windows of each kind of text, and their tokens.
WINDOWS, WIDTH = 8, 256


def smollm2(data: Path, work: Path, share: float = 1.0) -> tuple[Case, nn.Module, Profile]:
    """(the case with the quantized model, the float model, the profile).

    Args:
        data: the folder of the data, with `text/`.
        work: the folder in which the float model and the quantized one are kept; minutes where they are not there.
        share: of the held-out text.

    Raises:
        PeerError: the environment of SmolLM2's weights is not there, or they could not be written.
    """
    found = subjects.subject(subjects.weights(work), data, work, (max(1, round(WINDOWS * share)), WIDTH))
    case = Case(
        "smollm2",
        found.model,
        list(found.calibration.split(1)),
        list(found.held_out.split(4)),
        Logits(),
        "loss",
        token_losses,
        "most likely next token",
    )
    return case, found.reference, found.profile
