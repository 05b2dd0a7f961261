"""One worker's KV events on their way to the router's index: in order, none missing, none twice.

    Welcome (snapshot up to number n) ─► events n+1, n+2 ... ─► gap ─► new snapshot ─► go on

A gap empties what is known of the worker until a snapshot has been fetched beside the running
session; events that come meanwhile wait for it. Without a snapshot the session is given up. An
event that makes no sense is a gap as well; one that came before is left out. What cannot be
mended that way ends in a refusal: the session goes on, its KV events are not used, and the worker
is placed by load alone until it connects anew.

Does not know: the index, the connection.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

import grpc

from baton.core.block import HASH_BYTES, HASH_SCHEME, first_hash
from baton.core.kv_layout import KvLayout
from baton.core.tier import Tier
from baton.rpc.v1 import worker_pb2 as pb

logger = logging.getLogger(__name__)

MAX_REPAIRS = 5
"""Snapshots in a row without one good event between them; then the worker's events are refused."""


class KvFault(Enum):
    """What can be wrong with a worker's KV events."""

    GAP = "gap"
    REPLAYED = "replayed"
    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    """A snapshot above the bound, or above what a message holds."""
    HASHING = "hashing"
    """Blocks are named otherwise than here."""


class KvChange(NamedTuple):
    """One event; joined hashes, each in one of the parts."""

    removed: bytes
    on_disk: bytes
    on_host: bytes
    stored: bytes


Held = Mapping[Tier, bytes]
"""A worker's blocks, each under its best tier; joined hashes."""


class KvListener(Protocol):
    """Called on the event loop; must not block."""

    def on_kv_event(self, change: KvChange) -> None: ...

    def on_snapshot(self, held: Held) -> None:
        """Replaces everything known of the worker's blocks; empty while a gap is repaired."""
        ...

    def on_kv_fault(self, fault: KvFault) -> None:
        """To be counted."""
        ...

    def on_kv_refusal(self, reason: str) -> None:
        """Nothing more of this session's events is used; `on_snapshot` has emptied the rest."""
        ...


class KvFeed:
    """Of one session, `start` to `stop`; may be started again."""

    def __init__(
        self,
        name: str,
        listener: KvListener,
        *,
        fetch_snapshot: Callable[[], Awaitable[pb.Welcome]],
        give_up: Callable[[str], None],
        max_blocks: int,
    ) -> None:
        """`name`: the worker's, for the log. `fetch_snapshot` has a deadline of its own; it raises
        AioRpcError, or ValueError for an answer that is no snapshot.
        `max_blocks`: in a snapshot, and in events that wait for one."""
        self.refusal = ""
        """Why this session's events are not used; empty while they are."""
        self._name = name
        self._listener = listener
        self._fetch_snapshot = fetch_snapshot
        self._give_up = give_up
        self._max_blocks = max_blocks
        self._sequence = 0
        self._snapshot_sequence = 0
        self._repair: asyncio.Task[None] | None = None
        self._num_repairs = 0
        self._waiting: list[tuple[int, pb.KvEvent]] = []
        self._num_waiting_bytes = 0
        self._logged: set[KvFault] = set()

    def start(self, welcome: pb.Welcome, layout: KvLayout) -> Held:
        """Begin with a session's first message; what the worker holds, nothing after a refusal."""
        self.stop()
        self.refusal = ""
        self._num_repairs = 0
        self._logged.clear()
        reason = hashing_difference(welcome.hashing, layout)
        if reason:
            self._listener.on_kv_fault(KvFault.HASHING)
            self.refusal = reason
            return {}
        return self._held(welcome)

    def stop(self) -> None:
        if self._repair is not None:
            self._repair.cancel()
            self._repair = None
        self._drop_waiting()

    def push(self, first_sequence: int, events: Sequence[pb.KvEvent]) -> None:
        """Events as the worker sent them, the first with its number."""
        if self.refusal:
            return
        if self._repair is not None:
            self._wait(first_sequence, events)
            return
        if first_sequence < 1:
            self._resync(KvFault.MALFORMED, f"KV events are numbered from {first_sequence}")
            return
        events = self._unknown(first_sequence, events)
        if not events:
            return
        first_sequence = max(first_sequence, self._sequence + 1)
        if first_sequence != self._sequence + 1:
            text = f"KV event {first_sequence} follows {self._sequence}"
            self._resync(KvFault.GAP, text)
            return
        for number, event in enumerate(events):
            change = KvChange(event.removed, event.on_disk, event.on_host, event.stored)
            if any(len(part) % HASH_BYTES for part in change):
                text = f"KV event {first_sequence + number} has parts of hashes"
                self._resync(KvFault.MALFORMED, text)
                return
            self._sequence += 1
            self._num_repairs = 0
            self._listener.on_kv_event(change)

    def _unknown(self, first_sequence: int, events: Sequence[pb.KvEvent]) -> Sequence[pb.KvEvent]:
        """Without those applied already. A snapshot may contain events that were on their way."""
        num_known = min(max(0, self._sequence + 1 - first_sequence), len(events))
        if first_sequence + num_known - 1 > self._snapshot_sequence and num_known:
            text = f"KV events {first_sequence} to {first_sequence + num_known - 1} came before"
            self._fault(KvFault.REPLAYED, text)
        return events[num_known:]

    def _wait(self, first_sequence: int, events: Sequence[pb.KvEvent]) -> None:
        """Until the snapshot is here. Too many are dropped: the gap they leave is found then."""
        self._waiting += enumerate(events, start=first_sequence)
        self._num_waiting_bytes += sum(HASH_BYTES + event.ByteSize() for event in events)
        if self._num_waiting_bytes > self._max_blocks * HASH_BYTES:
            self._drop_waiting()

    def _drop_waiting(self) -> None:
        self._waiting.clear()
        self._num_waiting_bytes = 0

    def _resync(self, fault: KvFault, text: str) -> None:
        self._fault(fault, text)
        self._listener.on_snapshot({})
        self._num_repairs += 1
        if self._num_repairs > MAX_REPAIRS:
            self._refuse(f"{text}, after {MAX_REPAIRS} snapshots in a row")
            return
        self._repair = asyncio.create_task(self._repair_gap(), name="KV event gap")

    async def _repair_gap(self) -> None:
        """Fetch a snapshot beside the running session, then apply what came meanwhile."""
        try:
            snapshot = await self._fetch_snapshot()
        except grpc.aio.AioRpcError as error:
            self._repair = None
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                self._drop_waiting()
                self._listener.on_kv_fault(KvFault.TOO_LARGE)
                self._refuse(f"its snapshot is too large: {error.details()}")
                return
            self._give_up(f"gap in KV events and no snapshot: {error.code().name}")
            return
        except ValueError as error:
            self._repair = None
            self._drop_waiting()
            self._listener.on_kv_fault(KvFault.MALFORMED)
            self._refuse(f"it answers for its snapshot {error}")
            return
        events = list(self._waiting)
        self._drop_waiting()
        self._repair = None
        held = self._held(snapshot)
        if self.refusal:
            self._listener.on_kv_refusal(self.refusal)
            return
        self._listener.on_snapshot(held)
        for sequence, event in events:
            self.push(sequence, [event])

    def _held(self, snapshot: pb.Welcome) -> Held:
        """What the snapshot says; empty, and a refusal, when it cannot be used."""
        self._sequence = self._snapshot_sequence = snapshot.kv_sequence
        held = {
            Tier.DEVICE: snapshot.cached_hashes,
            Tier.HOST: snapshot.host_hashes,
            Tier.DISK: snapshot.disk_hashes,
        }
        num_bytes = sum(map(len, held.values()))
        if any(len(hashes) % HASH_BYTES for hashes in held.values()):
            reason = f"its snapshot of {num_bytes} bytes has parts of hashes"
            fault = KvFault.MALFORMED
        elif snapshot.num_left_out:
            reason = (
                f"its snapshot has {snapshot.num_left_out} blocks, more than one message holds; "
                "give it larger blocks or smaller tiers"
            )
            fault = KvFault.TOO_LARGE
        elif num_bytes > self._max_blocks * HASH_BYTES:
            reason = (
                f"its snapshot has {num_bytes // HASH_BYTES} blocks, above {self._max_blocks}; "
                "raise session.max_snapshot_blocks"
            )
            fault = KvFault.TOO_LARGE
        else:
            return held
        self._listener.on_kv_fault(fault)
        self.refusal = reason
        return {}

    def _refuse(self, reason: str) -> None:
        self.refusal = reason
        self._listener.on_kv_refusal(reason)

    def _fault(self, fault: KvFault, text: str) -> None:
        """Count it; the log has every gap, and of the rest each kind once a session."""
        self._listener.on_kv_fault(fault)
        if fault is KvFault.GAP or fault not in self._logged:
            self._logged.add(fault)
            logger.warning("worker %s: %s", self._name, text)


def hashing_difference(hashing: pb.BlockHashing, layout: KvLayout) -> str:
    """Why this router cannot name the worker's blocks; empty when it can."""
    if hashing.scheme != HASH_SCHEME:
        return f"it hashes blocks by {hashing.scheme or 'an unnamed scheme'}, not {HASH_SCHEME}"
    if hashing.block_size != layout.block_size:
        return f"it hashes blocks of {hashing.block_size} tokens and has {layout.block_size}"
    if hashing.fingerprint != layout.fingerprint:
        return (
            f"its KV layout has the fingerprint {hashing.fingerprint[:64]!r} there and "
            f"{layout.fingerprint!r} here"
        )
    if hashing.first_hash != first_hash(layout.fingerprint, layout.block_size):
        return "its hash of a known block is another one: another seed or release"
    return ""
