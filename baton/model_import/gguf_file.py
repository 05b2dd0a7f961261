"""Typed access to a GGUF file: metadata by key and dequantised tensors by name.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import gguf
import numpy as np
from gguf.quants import dequantize

from baton.core.errors import ConfigError

T = TypeVar("T")
_MISSING: Any = object()


class GgufTensor(NamedTuple):
    """A stored tensor; reading it costs nothing until `values` is called."""

    name: str
    shape: tuple[int, ...]
    """Outermost dimension first, as in a Hugging Face file."""
    stored: Any

    def values(self) -> np.ndarray:
        """float32, `shape`; the quantised blocks expanded."""
        try:
            expanded = dequantize(self.stored.data, self.stored.tensor_type)
        except NotImplementedError as error:
            raise ConfigError(
                f"tensor {self.name} is stored as {self.stored.tensor_type.name}, which cannot "
                "be expanded; use a file with another quantisation"
            ) from error
        return np.asarray(expanded, dtype=np.float32).reshape(self.shape)


class GgufFile:
    """Raises ConfigError when `path` is not a readable GGUF file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise ConfigError(f"{path} does not exist or is no file; name a .gguf file")
        try:
            self._reader = gguf.GGUFReader(path)
        except Exception as error:  # the reader has no error type of its own
            raise ConfigError(f"{path} is not a readable GGUF file: {error}") from error

    @property
    def architecture(self) -> str:
        return self.get("general.architecture", str)

    def get(self, key: str, kind: type[T], default: T = _MISSING) -> T:
        """The value of `key` as `kind`. Raises ConfigError when it is missing or another type."""
        field = self._reader.get_field(key)
        if field is None:
            if default is _MISSING:
                raise ConfigError(f"{self.path.name} has no metadata {key!r}")
            return default
        value = field.contents()
        if kind is float and isinstance(value, float):
            # Stored as float32: take the shortest decimal that means the same number.
            value = float(str(np.float32(value)))
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(
                f"{self.path.name}: {key} must be {kind.__name__}, got {type(value).__name__}"
            )
        return value

    def arch_get(self, key: str, kind: type[T], default: T = _MISSING) -> T:
        """Like `get` for a key below the architecture's name."""
        return self.get(f"{self.architecture}.{key}", kind, default)

    def has(self, key: str) -> bool:
        return self._reader.get_field(key) is not None

    def tensors(self) -> Iterator[GgufTensor]:
        for stored in self._reader.tensors:
            # GGUF lists the innermost dimension first.
            yield GgufTensor(stored.name, tuple(int(n) for n in reversed(stored.shape)), stored)
