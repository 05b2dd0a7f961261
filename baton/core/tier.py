"""Where a worker keeps a KV block, fastest first."""

from __future__ import annotations

from enum import IntEnum


class Tier(IntEnum):
    """The order is the order of preference: a block's best tier is its smallest."""

    DEVICE = 0
    """In the KV pool: attention reads it where it is."""
    HOST = 1
    """In the worker's host memory, restored by a copy."""
    DISK = 2
    """In the worker's directory, restored by a read and a copy."""
