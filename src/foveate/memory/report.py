"""MemoryReport: what is in memory, what is not, and how often that was felt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from foveate.sizes import format_bytes


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """The state of a model that may take only so much memory.

    Attributes:
        limit: bytes that the model may take.
        fixed: bytes of all that always stays: scales, tile index, what is not on planes.
        resident: bytes of planes in memory.
        stored: bytes of planes in the folder.
        waiting: bytes of planes that are asked for and not in memory yet.
        floor: bytes of planes that never leave.
        passes: how often the model was called.
        fallback_count: for each weight site, the passes that read a part of it at a lower level than the map in force
            says, because planes were not in memory; sites that never did are left out.
        io_errors: for each file, how many reads failed or gave other bytes than were saved.
        fetched, evicted: bytes that came into memory since loading, and that left it.
        wait_s: seconds that passes waited for planes (`strict=True`).
    """

    limit: int
    fixed: int
    resident: int
    stored: int
    waiting: int
    floor: int
    passes: int
    fallback_count: Mapping[str, int] = field(default_factory=dict)
    io_errors: Mapping[str, int] = field(default_factory=dict)
    fetched: int = 0
    evicted: int = 0
    wait_s: float = 0.0

    @property
    def taken(self) -> int:
        """Bytes that the model takes now."""
        return self.fixed + self.resident

    def __str__(self) -> str:
        lines = [
            f"{format_bytes(self.taken)} in memory of at most {format_bytes(self.limit)}: "
            f"{format_bytes(self.resident)} of {format_bytes(self.stored)} of planes, "
            f"{format_bytes(self.fixed)} of the rest"
        ]
        if self.waiting:
            lines.append(f"{format_bytes(self.waiting)} of planes on their way")
        if self.fallback_count:
            worst = max(self.fallback_count, key=lambda name: self.fallback_count[name])
            lines.append(
                f"{len(self.fallback_count)} weights were read below the map in force, "
                f"{worst} in {self.fallback_count[worst]} of {self.passes} passes"
            )
        lines += [f"{count} reads of {file} failed" for file, count in self.io_errors.items()]
        return "\n".join(lines)
