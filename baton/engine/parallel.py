"""Which part of a model one process holds. Numbers only: no torch, no processes."""

from __future__ import annotations

from dataclasses import dataclass

from baton.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Parallel:
    """A rank of a tensor-parallel group. Rank 0 schedules; all ranks compute."""

    tp_rank: int = 0
    tp_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.tp_rank < self.tp_size:
            raise ConfigError(f"tp_rank {self.tp_rank} is outside 0..{self.tp_size - 1}")

    @property
    def is_single(self) -> bool:
        return self.tp_size == 1

    def share(self, size: int, what: str) -> slice:
        """This rank's equal part of `size`. Raises ConfigError when it does not divide."""
        if size % self.tp_size:
            raise ConfigError(
                f"tp_size {self.tp_size} does not divide {what} {size}; take a divisor of it"
            )
        part = size // self.tp_size
        return slice(self.tp_rank * part, (self.tp_rank + 1) * part)


SINGLE = Parallel()
