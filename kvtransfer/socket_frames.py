"""The frames of the socket transport, as bytes. Pure.

    reader                                  owner
    HELLO(nonce, both names) ────────────►
          ◄──────────────────── NONCE
    PROOF(HMAC of all before) ───────────►  the reader holds the secret
          ◄──────────────────── WELCOME     so does the owner, and it is the process wanted
    PLAN(pieces of the owner's blocks) ──►
    READ(read id, unit ids) ─────────────►  several may be open at once
          ◄──────────────────── ANSWER(read id, bytes of all pieces, unit by unit), in order
          ◄──────────────────── REFUSED(reason), then the end of the connection

    frame = version (1 byte), kind (1), zero (2), length of the body (4), body     big-endian

The secret never travels: each side proves that it knows it, over the nonces of both and the names
and epochs of both, so that a recorded exchange proves nothing later and no answer of one side can
be sent back to it as its own. What follows the proof is neither encrypted nor authenticated unless
the connection is TLS.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from baton.core.errors import TransferError
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer.metadata import PeerIdentity
from kvtransfer.plan import BlockIds, SidePlan

VERSION = 1
HEADER = struct.Struct("!BBHI")
READ_ID = struct.Struct("!Q")
NONCE_BYTES = 32
PROOF_BYTES = hashlib.sha256().digest_size
MAX_UNITS_PER_READ = 1 << 16
MAX_PIECES_PER_BLOCK = 1 << 16
MAX_NAME_BYTES = 255
MAX_REASON_BYTES = 500
_NAME = struct.Struct("!B")
_PLAN = struct.Struct("!IIIQQ")


class FrameKind(IntEnum):
    """Values are the protocol's."""

    HELLO = 1
    NONCE = 2
    PROOF = 3
    WELCOME = 4
    PLAN = 5
    READ = 6
    ANSWER = 7
    REFUSED = 8


class BadFrame(TransferError):
    """The other side does not speak this protocol, or not now."""


_MAX_BODY_BYTES = {
    FrameKind.HELLO: NONCE_BYTES + 4 * (_NAME.size + MAX_NAME_BYTES),
    FrameKind.NONCE: NONCE_BYTES,
    FrameKind.PROOF: PROOF_BYTES,
    FrameKind.WELCOME: PROOF_BYTES,
    FrameKind.PLAN: _PLAN.size + 8 * MAX_PIECES_PER_BLOCK,
    FrameKind.READ: READ_ID.size + 4 * MAX_UNITS_PER_READ,
    FrameKind.ANSWER: (1 << 32) - 1,
    FrameKind.REFUSED: MAX_REASON_BYTES,
}
MAX_ANSWER_BYTES = _MAX_BODY_BYTES[FrameKind.ANSWER] - READ_ID.size


@dataclass(frozen=True, slots=True)
class Hello:
    """Who wants to read from whom."""

    nonce: bytes
    reader: PeerIdentity
    owner: PeerIdentity


class ReadRequest(NamedTuple):
    read_id: int
    units: BlockIds
    """Not checked against any pool."""


class Frame(NamedTuple):
    kind: FrameKind
    body: bytes


def frame(kind: FrameKind, body: bytes) -> bytes:
    return HEADER.pack(VERSION, kind, 0, len(body)) + body


def answer_header(read_id: int, num_bytes: int) -> bytes:
    """What goes before the bytes of an answer."""
    length = READ_ID.size + num_bytes
    return HEADER.pack(VERSION, FrameKind.ANSWER, 0, length) + READ_ID.pack(read_id)


def parse_header(header: bytes | bytearray) -> tuple[FrameKind, int]:
    """Kind and length of the body. Raises BadFrame before a byte of the body is taken."""
    version, number, zero, length = HEADER.unpack(header)
    if version != VERSION:
        raise BadFrame(f"socket protocol version {version}, {VERSION} is spoken here")
    if number not in FrameKind.__members__.values() or zero:
        raise BadFrame(f"unknown frame kind {number}")
    kind = FrameKind(number)
    if length > _MAX_BODY_BYTES[kind]:
        raise BadFrame(f"{kind.name} frame of {length} bytes, limit {_MAX_BODY_BYTES[kind]}")
    return kind, length


class FrameBuffer:
    """Puts the frames of a byte stream together."""

    def __init__(self) -> None:
        self._data = bytearray()

    def add(self, data: bytes) -> None:
        self._data += data

    def next(self) -> Frame | None:
        """The next complete frame. Raises BadFrame as soon as a header shows one."""
        if len(self._data) < HEADER.size:
            return None
        kind, length = parse_header(self._data[: HEADER.size])
        end = HEADER.size + length
        if len(self._data) < end:
            return None
        body = bytes(self._data[HEADER.size : end])
        del self._data[:end]
        return Frame(kind, body)


def hello_body(hello: Hello) -> bytes:
    """Raises BadFrame for a name that no peer would take."""
    names = (
        hello.reader.worker_id,
        hello.reader.epoch,
        hello.owner.worker_id,
        hello.owner.epoch,
    )
    body = hello.nonce
    for name in names:
        text = name.encode()
        if len(text) > MAX_NAME_BYTES:
            raise BadFrame(f"a name of {len(text)} bytes, limit {MAX_NAME_BYTES}")
        body += _NAME.pack(len(text)) + text
    return body


def parse_hello(body: bytes) -> Hello:
    """Raises BadFrame."""
    names, at = [], NONCE_BYTES
    try:
        for _ in range(4):
            (length,) = _NAME.unpack_from(body, at)
            at += _NAME.size
            text = body[at : at + length]
            if len(text) != length:
                raise BadFrame("HELLO is cut off")
            names.append(text.decode())
            at += length
    except (struct.error, UnicodeDecodeError):
        raise BadFrame("HELLO is malformed") from None
    if at != len(body):
        raise BadFrame("HELLO has bytes to spare")
    return Hello(
        body[:NONCE_BYTES],
        PeerIdentity(WorkerId(names[0]), Epoch(names[1])),
        PeerIdentity(WorkerId(names[2]), Epoch(names[3])),
    )


def reader_proof(secret: bytes, hello: bytes, owner_nonce: bytes) -> bytes:
    """That the reader holds the secret; `hello` is the body it sent."""
    return _proof(secret, b"reader", hello, owner_nonce)


def owner_proof(secret: bytes, hello: bytes, owner_nonce: bytes) -> bytes:
    return _proof(secret, b"owner", hello, owner_nonce)


def _proof(secret: bytes, who: bytes, hello: bytes, owner_nonce: bytes) -> bytes:
    context = b"baton kv socket %d %s\x00" % (VERSION, who)
    return hmac.digest(secret, context + hello + owner_nonce, "sha256")


def plan_body(side: SidePlan) -> bytes:
    """The owner's side of the pair."""
    num_parts, num_pieces = side.offsets.shape
    head = _PLAN.pack(num_parts, num_pieces, side.num_blocks, side.block_bytes, side.piece_bytes)
    return head + side.offsets.astype(">i8").tobytes()


def parse_plan(body: bytes) -> SidePlan:
    """Raises BadFrame or, for pieces outside of their block, TransferError."""
    if len(body) < _PLAN.size:
        raise BadFrame("PLAN is cut off")
    num_parts, num_pieces, num_blocks, block_bytes, piece_bytes = _PLAN.unpack_from(body)
    count = num_parts * num_pieces
    if not 1 <= count <= MAX_PIECES_PER_BLOCK or len(body) != _PLAN.size + 8 * count:
        raise BadFrame(f"PLAN of {len(body)} bytes for {num_parts} times {num_pieces} pieces")
    if not 1 <= piece_bytes <= block_bytes < 1 << 62 or not 1 <= num_blocks < 1 << 31:
        raise BadFrame(f"PLAN with pieces of {piece_bytes} bytes in blocks of {block_bytes}")
    offsets = np.frombuffer(body, dtype=">i8", offset=_PLAN.size).astype(np.int64)
    return SidePlan(num_blocks, block_bytes, offsets.reshape(num_parts, num_pieces), piece_bytes)


def read_body(read_id: int, units: BlockIds) -> bytes:
    """Raises BadFrame for more units than one frame may name."""
    if len(units) > MAX_UNITS_PER_READ:
        raise BadFrame(f"a read of {len(units)} units, limit {MAX_UNITS_PER_READ}")
    return READ_ID.pack(read_id) + units.astype(">u4").tobytes()


def parse_read(body: bytes) -> ReadRequest:
    """Raises BadFrame."""
    if len(body) <= READ_ID.size or (len(body) - READ_ID.size) % 4:
        raise BadFrame(f"READ of {len(body)} bytes")
    units = np.frombuffer(body, dtype=">u4", offset=READ_ID.size).astype(np.int64)
    if units.max() >= 1 << 31:
        raise BadFrame(f"unit {int(units.max())} is beyond every pool")
    return ReadRequest(READ_ID.unpack_from(body)[0], units.astype(np.int32))


def refused_frame(reason: str) -> bytes:
    return frame(FrameKind.REFUSED, reason.encode()[:MAX_REASON_BYTES])
