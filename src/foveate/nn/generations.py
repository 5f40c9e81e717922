"""Generations: the state of a live model's levels, and how a change of it is published whole.

A change is composed on the thread of its writer (`foveate.precision.state.compose`) and given to the kernels as one
block; passes that have begun go on with the generation that they pinned. The tensors that modules show,
`active_levels`, `input_level` and `input_range`, are a copy of the newest generation's default map. Exported programs
and `weight.dequantize()` read them, no product of a live model does.

`foveate.nn.levels` has what users and deciders call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from foveate.nn.passes import Passes
from foveate.precision.adaptation import Choice
from foveate.precision.state import Composed, LevelState, compose

Read = Callable[[Composed, Tensor], Tensor]


class Generations:
    """The generations of one model.

    Args:
        passes: the passes of the model, which are bound to these generations.
        tiles: how many tiles each weight of the model has.
        inputs: the names of its inputs, in order.
        shown: the tensors that show the newest generation: levels of tiles [tiles] and of inputs [inputs], and ranges
            [2 * inputs].
    """

    def __init__(
        self,
        passes: Passes,
        tiles: Sequence[int],
        inputs: tuple[str, ...],
        shown: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        self.passes, self._inputs, self._shown = passes, inputs, shown
        with torch.inference_mode(False):  # passes in any mode say that they change it
            self.book: Tensor = torch.ops.foveate.generation_book(shown[2], list(tiles), len(inputs))
        self._lock = threading.Lock()
        self.state: LevelState | None = None
        self.composed: Composed | None = None
        self.number = 0
        passes.bind(self.book)
        #: Of the newest generation, for each pair of maps that inputs choose between: int64 [weights, 2], rows that
        #: were decided and rows that read the higher map.
        self.counts: Mapping[tuple[int, int], Tensor] = {}
        self._publish(shown[0][None], shown[1][None], shown[2], torch.zeros(1, 2, dtype=torch.uint8), [])

    def change(self, changed: Callable[[LevelState | None], LevelState], read: Read) -> LevelState:
        """Put a changed state in force from the next pass on; if it is refused, nothing changes.

        Args:
            changed: makes the new state of the present one, which is None at first. One thread changes it at a time.
            read: gives the levels that are read where maps say some levels (uint8 [maps, tiles]); raises if they cannot
                be, or a map is of another model.

        Returns:
            The new state.
        """
        with self._lock:
            state = changed(self.state)
            composed = compose(state)
            levels = _block([one.weights for one in composed.encoded])
            self._put(composed, read(composed, levels))
            self.state, self.composed = state, composed
        return state

    def now(self) -> tuple[int, int]:
        """The pass of this thread that is open; outside of any, the newest generation."""
        begun = self.passes.pinned()
        return begun, 0 if begun else self.number

    def _put(self, composed: Composed, levels: Tensor) -> None:
        inputs = _block([one.inputs for one in composed.encoded])
        if composed.ranges:
            ranges = torch.tensor(
                [composed.ranges.get(name, (0.0, 0.0)) for name in self._inputs], dtype=torch.float32
            ).view(-1)
        else:
            ranges = torch.zeros(2 * len(self._inputs), dtype=torch.float32)
        choices = _choices(composed.choices)
        self._publish(levels, inputs, ranges, torch.tensor(composed.pairs, dtype=torch.uint8), choices)
        self.counts = dict(zip(composed.choices, choices[-1] if choices else (), strict=True))

    def _publish(
        self, levels: Tensor, inputs: Tensor, ranges: Tensor, pairs: Tensor, choices: Sequence[Tensor]
    ) -> None:
        self.number = torch.ops.foveate.publish(self.book, levels, inputs, ranges, pairs, choices)
        first = int(pairs[0, 1])
        for shown, now in zip(self._shown, (levels[first], inputs[first], ranges), strict=True):
            shown.copy_(now)


def _choices(choices: Mapping[tuple[int, int], Choice]) -> list[Tensor]:
    """What decides between the maps of each pair, as the op `publish` takes it."""
    if not choices:
        return []
    samples = [sample for choice in choices.values() for sample in choice.samples]
    weights = len(samples) // len(choices)
    ends = torch.tensor([0] + [len(sample.strips) for sample in samples]).cumsum(0)
    begins = torch.stack([ends[weights * d : weights * (d + 1) + 1] for d in range(len(choices))])
    return [
        torch.tensor(list(choices), dtype=torch.uint8),
        torch.tensor([choice.thresholds for choice in choices.values()], dtype=torch.float32).view(-1, weights),
        begins,
        torch.cat([sample.strips for sample in samples]),
        torch.cat([sample.row_weights for sample in samples]),
        torch.zeros(len(choices), weights, 2, dtype=torch.int64),
    ]


def _block(parts: list[bytes]) -> Tensor:
    """Bytes of equal length, one part a row: uint8 [parts, bytes]."""
    joined = bytearray().join(parts)
    if not joined:
        return torch.empty(len(parts), 0, dtype=torch.uint8)
    return torch.frombuffer(joined, dtype=torch.uint8).view(len(parts), -1)
