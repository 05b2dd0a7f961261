"""What the owner does with the frames of one reader: proof, plan, answers. No socket, no clock.

    HELLO ─► PROOF ─► PLAN ─► READ, READ, ...

The bytes of an answer are views of the pool, made as they are sent. Whatever raises here ends the
connection, with the text as the reason the reader is told.
"""

from __future__ import annotations

import hmac
from collections import deque
from enum import Enum, auto

from baton.core.errors import TransferError
from kvtransfer.byte_spans import SpanCursor, byte_spans
from kvtransfer.metadata import PeerIdentity
from kvtransfer.plan import RankPool, SidePlan, checked_ids
from kvtransfer.socket_frames import (
    MAX_ANSWER_BYTES,
    NONCE_BYTES,
    BadFrame,
    Frame,
    FrameBuffer,
    FrameKind,
    answer_header,
    frame,
    owner_proof,
    parse_hello,
    parse_plan,
    parse_read,
    reader_proof,
    refused_frame,
)

MAX_OPEN_READS = 256
MAX_OPEN_SPANS = 1 << 18
"""Of the reads that one reader has open; its next requests wait in the network."""


class _Stage(Enum):
    HELLO = auto()
    PROOF = auto()
    PLAN = auto()
    READS = auto()
    REFUSED = auto()


class OwnerSession:
    """One reader of the pool in `memory`."""

    def __init__(
        self,
        memory: memoryview,
        pool: RankPool,
        identity: PeerIdentity,
        secret: bytes,
        nonce: bytes,
    ) -> None:
        """`nonce` is random and used for this session alone."""
        assert len(nonce) == NONCE_BYTES
        self._memory = memory
        self._pool = pool
        self._identity = identity
        self._secret = secret
        self._nonce = nonce
        self._hello = b""
        self._stage = _Stage.HELLO
        self._side: SidePlan | None = None
        self._frames = FrameBuffer()
        self._control = b""
        self._answers: deque[tuple[bytes, SpanCursor, int]] = deque()
        """What is left of the header, the bytes behind it, and the number of spans."""
        self._num_open_spans = 0
        self.reader: PeerIdentity | None = None
        """Who is connected, once proved."""

    @property
    def has_begun(self) -> bool:
        return self._stage is not _Stage.HELLO

    @property
    def is_ready(self) -> bool:
        """The reader has proved itself and said how it reads."""
        return self._stage is _Stage.READS

    @property
    def is_refused(self) -> bool:
        return self._stage is _Stage.REFUSED

    @property
    def has_output(self) -> bool:
        return bool(self._control or self._answers)

    @property
    def wants_input(self) -> bool:
        return (
            self._stage is not _Stage.REFUSED
            and len(self._answers) < MAX_OPEN_READS
            and self._num_open_spans < MAX_OPEN_SPANS
        )

    def receive(self, data: bytes) -> None:
        """Raises TransferError: the reader must be refused."""
        self._frames.add(data)
        self._go_on()

    def refuse(self, reason: str) -> None:
        """Nothing but the reason is sent any more. Not in the middle of an answer, where it would
        be taken for KV: then the connection just ends."""
        is_between_frames = not self._answers or len(self._answers[0][0]) == _WHOLE_HEADER
        self._answers.clear()
        self._stage = _Stage.REFUSED
        self._control += refused_frame(reason) if is_between_frames else b""

    def output(self, max_buffers: int) -> list[memoryview]:
        """What is to be sent next."""
        if self._control:
            return [memoryview(self._control)]
        if not self._answers:
            return []
        header, cursor, _ = self._answers[0]
        if header:
            return [memoryview(header), *cursor.window(max_buffers - 1)]
        return cursor.window(max_buffers)

    def sent(self, num_bytes: int) -> None:
        """So many bytes of `output` are on their way. Raises as `receive` does."""
        if self._control:
            self._control = self._control[num_bytes:]
            return
        header, cursor, num_spans = self._answers[0]
        of_header = min(len(header), num_bytes)
        cursor.pass_over(num_bytes - of_header)
        self._answers[0] = (header[of_header:], cursor, num_spans)
        if of_header == len(header) and not cursor.num_left:
            self._answers.popleft()
            self._num_open_spans -= num_spans
            self._go_on()

    def _go_on(self) -> None:
        while self.wants_input:
            frame_in = self._frames.next()
            if frame_in is None:
                return
            self._take(frame_in)

    def _take(self, frame_in: Frame) -> None:
        match self._stage, frame_in.kind:
            case _Stage.HELLO, FrameKind.HELLO:
                self._hello = frame_in.body
                self._control += frame(FrameKind.NONCE, self._nonce)
                self._stage = _Stage.PROOF
            case _Stage.PROOF, FrameKind.PROOF:
                self._admit(frame_in.body)
                self._stage = _Stage.PLAN
            case _Stage.PLAN, FrameKind.PLAN:
                self._accept_plan(frame_in.body)
                self._stage = _Stage.READS
            case _Stage.READS, FrameKind.READ:
                self._answer(frame_in.body)
            case _:
                raise BadFrame(f"{frame_in.kind.name} frame where {self._stage.name} is due")

    def _admit(self, proof: bytes) -> None:
        if not hmac.compare_digest(proof, reader_proof(self._secret, self._hello, self._nonce)):
            raise TransferError("wrong proof; do all workers share one secret?")
        # Names are looked at only now: a stranger learns nothing of ours.
        hello = parse_hello(self._hello)
        if hello.owner != self._identity:
            raise TransferError(
                f"this is worker {self._identity.worker_id} in epoch {self._identity.epoch}, "
                f"not {hello.owner.worker_id} in epoch {hello.owner.epoch}"
            )
        self.reader = hello.reader
        proof = owner_proof(self._secret, self._hello, self._nonce)
        self._control += frame(FrameKind.WELCOME, proof)

    def _accept_plan(self, body: bytes) -> None:
        side = parse_plan(body)
        mine = (self._pool.num_blocks, self._pool.block_bytes)
        if (side.num_blocks, side.block_bytes) != mine:
            raise TransferError(
                f"plan for {side.num_blocks} blocks of {side.block_bytes} bytes; this pool has "
                f"{mine[0]} of {mine[1]}"
            )
        self._side = side

    def _answer(self, body: bytes) -> None:
        assert self._side is not None
        side = self._side
        read_id, units = parse_read(body)
        checked_ids(units.tolist(), side.num_units, "the owner's")
        num_bytes = len(units) * side.unit_bytes
        num_pieces = len(units) * side.offsets.shape[1]
        if num_bytes > MAX_ANSWER_BYTES or num_pieces > MAX_OPEN_SPANS:
            raise TransferError(
                f"a read of {num_bytes} bytes in {num_pieces} pieces; {MAX_ANSWER_BYTES} in "
                f"{MAX_OPEN_SPANS} are allowed"
            )
        spans = byte_spans(side, units)
        header = answer_header(read_id, num_bytes)
        self._answers.append((header, SpanCursor(self._memory, spans), len(spans.starts)))
        self._num_open_spans += len(spans.starts)


_WHOLE_HEADER = len(answer_header(0, 0))
