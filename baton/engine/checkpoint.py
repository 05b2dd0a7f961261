"""Named tensors of a model folder, read one at a time and only the part that is asked for.

Not known here: what the tensors mean.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from baton.core.errors import ConfigError

INDEX_NAME = "model.safetensors.index.json"
FLOAT_TYPES = (torch.bfloat16, torch.float16, torch.float32)
FINGERPRINT_SAMPLES = 256
"""Pieces of each weight file that enter the model id, beside its size and header."""
FINGERPRINT_SAMPLE_BYTES = 4096

LoadProgress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), from the loading thread."""
Part = tuple[slice, ...]
"""One slice per dimension."""


class TensorSource(Protocol):
    """Where a model's tensors come from; each may be taken once."""

    def has(self, name: str) -> bool: ...

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        part: Part | None = None,
        dtypes: Sequence[torch.dtype] = FLOAT_TYPES,
    ) -> Tensor:
        """`part` of the tensor `name`, whose whole is of `shape` and of one of `dtypes`.

        Raises ConfigError if it is absent, misshapen or of another type.
        """
        ...

    def left(self) -> list[str]:
        """Names that nobody took."""
        ...


class Checkpoint:
    """The tensors of one or several safetensors files."""

    def __init__(self, files: Sequence[Path], on_progress: LoadProgress | None = None) -> None:
        self._file_of: dict[str, Path] = {}
        for path in files:
            with _open(path) as file:
                self._file_of.update(dict.fromkeys(file.keys(), path))
        self._left = set(self._file_of)
        self._on_progress = on_progress
        self._total_bytes = sum(path.stat().st_size for path in files)
        self._done_bytes = 0

    def has(self, name: str) -> bool:
        return name in self._file_of

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        part: Part | None = None,
        dtypes: Sequence[torch.dtype] = FLOAT_TYPES,
    ) -> Tensor:
        """See TensorSource. The result may be a view of the mapped file: copy it to keep it."""
        path = self._file_of.get(name)
        if path is None:
            raise ConfigError(f"the checkpoint has no tensor {name!r}")
        with _open(path) as file:
            stored = file.get_slice(name)
            if tuple(stored.get_shape()) != shape:
                raise ConfigError(
                    f"tensor {name!r} has shape {tuple(stored.get_shape())}, config.json implies "
                    f"{shape}"
                )
            tensor: Tensor = file.get_tensor(name) if part is None else stored[part]
        if tensor.dtype not in dtypes:
            raise ConfigError(
                f"tensor {name!r} is of type {tensor.dtype}, config.json implies "
                f"{' or '.join(str(dtype) for dtype in dtypes)}"
            )
        self._left.discard(name)
        self._done_bytes += math.prod(shape) * tensor.element_size()
        if self._on_progress is not None:
            self._on_progress(self._done_bytes, self._total_bytes)
        return tensor

    def left(self) -> list[str]:
        return sorted(self._left)


def _open(path: Path) -> safe_open:
    """Opened for each tensor anew: the pages of a mapped file stay resident until it is closed."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path.name} is not a readable safetensors file: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by its index when it has one. Raises ConfigError."""
    index = folder / INDEX_NAME
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ConfigError(f"no *.safetensors in {folder}; convert the model's weights first")
        return files
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{INDEX_NAME} has no readable weight_map: {error!r}") from error
    files = [folder / name for name in names]
    for file in files:
        if file.parent != folder or not file.exists():
            raise ConfigError(f"{INDEX_NAME} names {file.name!r}, which is not in the folder")
    return files


def model_id(folder: Path, files: Sequence[Path]) -> str:
    """16 hex digits over config.json and the weights: size, header and evenly spaced samples.

    Independent of time stamps and of the folder's name, and cheap for large models.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header_bytes, size)))
            for i in range(FINGERPRINT_SAMPLES):
                file.seek(i * size // FINGERPRINT_SAMPLES)
                digest.update(file.read(FINGERPRINT_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def revised_id(identity: str, revision: str) -> str:
    """16 hex digits of their own for each `revision` of the same weights."""
    return hashlib.sha256(f"{identity}/{revision}".encode()).hexdigest()[:16]
