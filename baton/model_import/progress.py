"""How far an import is, told to whoever shows it."""

from __future__ import annotations

from enum import Enum
from typing import Protocol


class Unit(Enum):
    """What a stage counts."""

    BYTES = "bytes"
    TENSORS = "tensors"
    RUNS = "runs"
    REQUESTS = "requests"


class ImportProgress(Protocol):
    """Receives stages one after the other; called from one thread."""

    def start_stage(self, description: str, total: int | None, unit: Unit) -> None:
        """`total` is None when the end is not known."""
        ...

    def update(self, completed: int) -> None:
        """`completed` of the current stage, counted from its start."""
        ...

    def note(self, message: str) -> None:
        """A sentence for the user beside the numbers."""
        ...


class SilentProgress:
    """Shows nothing."""

    def start_stage(self, description: str, total: int | None, unit: Unit) -> None:
        pass

    def update(self, completed: int) -> None:
        pass

    def note(self, message: str) -> None:
        pass
