"""Blocks that the owner is computing, as far as their reader has followed it. Pure.

Layers of them are read before they are leased, and kept only if the last chunk names the same
blocks, filled by the same computation: the owner did not let go of them in between. Positions and
ids are units (see `fetch_machine`).
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.core.block import BlockId


@dataclass(slots=True, eq=False)
class Filling:
    """One computation of one prompt's last blocks."""

    fill_id: int
    first: int
    """Position of `remote[0]`."""
    remote: tuple[BlockId, ...]
    num_layers: int
    """Of the model."""
    num_ready: int
    """Layers that are complete."""
    num_read: int = 0
    """Layers that are here, or in flight."""
    is_told: bool = False
    """The owner knows that all are here."""

    def is_same(self, fill_id: int, remote: tuple[BlockId, ...]) -> bool:
        return (self.fill_id, self.remote) == (fill_id, remote)

    def is_confirmed_by(self, fill_id: int, first: int, announced: tuple[BlockId, ...]) -> bool:
        """By an announcement of the units from position `first` on."""
        return self.first >= first and self.is_same(fill_id, announced[self.first - first :])

    def units(self, first: int, end: int) -> tuple[BlockId, ...]:
        """The owner's units at these positions."""
        return self.remote[first - self.first : end - self.first]

    def take_ready(self) -> range:
        """The layers to read now."""
        layers = range(self.num_read, self.num_ready)
        self.num_read = max(self.num_read, self.num_ready)
        return layers

    @property
    def rest(self) -> range:
        """Layers that are not here."""
        return range(self.num_read, self.num_layers)
