"""Where a live system is, for tests that only talk to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class LiveSystem:
    url: str
    grpc: str
    """host:port."""
    model: str
    tokenizer: Path
    """Folder with the tokenizer's files."""
