"""Closing: what ends by `close()`, and so works as a context manager; the base of deciders that withdraw at the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import TypeVar

C = TypeVar("C", bound="Closing")


class Closing(ABC):
    """Ends by `close()`, also where a `with` block over it ends."""

    @abstractmethod
    def close(self) -> None:
        """End it; what it decided is withdrawn. A second call does nothing."""

    def __enter__(self: C) -> C:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
