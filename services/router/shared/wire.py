"""What lies in a store or travels through it, as bytes, and the checks on the way back in.

A key's record is JSON. A batch of placements is binary: a magic number, the sender's id and the
notes, all integers little-endian.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence
from typing import NamedTuple

import orjson

from baton.core.block import HASH_BYTES
from baton.core.config import build
from baton.core.errors import ConfigError
from baton.core.worker_info import WorkerId
from services.router.shared.state import PlacementNote, TenantRecord

RECORD_FORMAT = 1
MAX_RECORD_BYTES = 4096
MAX_BATCH_BYTES = 4 << 20
MAX_NOTE_BLOCKS = 1024
"""Of a longer prompt only the leading blocks are told: 16 KiB a note."""
MAX_ID_BYTES = 255
"""A worker with a longer id is told of nowhere."""

_MAGIC = b"BPN1"
_NOTE = struct.Struct("<BBIIH")
"""Bytes of the two worker ids, prefill tokens, KV tokens, blocks."""
_MAX_TOKENS = (1 << 32) - 1


class Batch(NamedTuple):
    sender: str
    notes: list[PlacementNote]


def record_to_json(record: TenantRecord) -> bytes:
    return orjson.dumps({"format": RECORD_FORMAT, **dataclasses.asdict(record)})


def record_from_json(data: bytes) -> TenantRecord:
    """Raises ValueError saying what is wrong with `data`."""
    if len(data) > MAX_RECORD_BYTES:
        raise ValueError(f"a key's record has at most {MAX_RECORD_BYTES} bytes, this one has more")
    try:
        values = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    found = values.pop("format", None)
    if found != RECORD_FORMAT:
        raise ValueError(f"format {str(found)[:20]!r}, this version reads {RECORD_FORMAT}")
    for name in ("tenant", "slo_class"):
        # Settings take anything for text; a name must have been meant as one.
        if not isinstance(values.get(name, ""), str):
            raise ValueError(f"{name} is not a string")
    try:
        return build(TenantRecord, values)
    except ConfigError as error:
        raise ValueError(str(error)) from error


def encode_batch(sender: str, notes: Sequence[PlacementNote]) -> bytes:
    """Notes that name a worker by more than `MAX_ID_BYTES` are left out."""
    parts = [_MAGIC, bytes([len(sender.encode())]), sender.encode()]
    for note in notes:
        prefill, decode = (note.prefill_worker or "").encode(), (note.decode_worker or "").encode()
        if max(len(prefill), len(decode)) > MAX_ID_BYTES:
            continue
        num_blocks = min(MAX_NOTE_BLOCKS, len(note.hashes) // HASH_BYTES)
        parts += [
            _NOTE.pack(
                len(prefill),
                len(decode),
                min(note.prefill_tokens, _MAX_TOKENS),
                min(note.kv_tokens, _MAX_TOKENS),
                num_blocks,
            ),
            prefill,
            decode,
            note.hashes[: num_blocks * HASH_BYTES],
        ]
    return b"".join(parts)


def decode_batch(data: bytes) -> Batch:
    """Raises ValueError saying what is wrong with `data`."""
    if len(data) > MAX_BATCH_BYTES:
        raise ValueError(f"a batch of {len(data)} bytes, {MAX_BATCH_BYTES} at most")
    if data[: len(_MAGIC)] != _MAGIC:
        raise ValueError(f"starts with {data[:4]!r}, not with {_MAGIC!r}")
    reader = _Reader(data, len(_MAGIC))
    sender = reader.text(reader.take(1)[0])
    notes = []
    while not reader.is_done:
        header = reader.take(_NOTE.size)
        prefill_size, decode_size, prefill_tokens, kv_tokens, num_blocks = _NOTE.unpack(header)
        prefill, decode = reader.text(prefill_size), reader.text(decode_size)
        if num_blocks > MAX_NOTE_BLOCKS:
            raise ValueError(f"a note of {num_blocks} blocks, {MAX_NOTE_BLOCKS} at most")
        notes.append(
            PlacementNote(
                hashes=reader.take(num_blocks * HASH_BYTES),
                prefill_worker=WorkerId(prefill) if prefill else None,
                decode_worker=WorkerId(decode) if decode else None,
                prefill_tokens=prefill_tokens,
                kv_tokens=kv_tokens,
            )
        )
    return Batch(sender, notes)


class _Reader:
    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self._at = at

    @property
    def is_done(self) -> bool:
        return self._at == len(self._data)

    def take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._data):
            raise ValueError(f"ends after {len(self._data)} bytes, in the middle of a note")
        piece = self._data[self._at : end]
        self._at = end
        return piece

    def text(self, size: int) -> str:
        return self.take(size).decode()
