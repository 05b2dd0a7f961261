"""Frozen dataclasses as plain JSON values; `baton.core.config.build` makes them again.

Numbers come back exactly. An infinite one, which JSON has no word for, is a string.
"""

from __future__ import annotations

import dataclasses
import math
from enum import Enum
from pathlib import Path
from typing import Any


def to_plain(value: Any) -> Any:
    """Of dataclasses, tuples, lists, enums, paths, numbers, strings and None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            part.name: to_plain(getattr(value, part.name)) for part in dataclasses.fields(value)
        }
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
