"""One fetch as a pure state machine; `fetch_state` has the life cycle.

The caller names whole blocks. Inside everything is counted in units, by position in the fetched
sequence, so that pools of unequal block sizes meet:

    owner, 2 units a block    | b0 u0 | b0 u1 | b1 u0 | b1 u1 |       announced: 4 units
    reader, 1 unit a block    | b0    | b1    | b2    |               reserved: 3 units, 3 are read

The last block of a sequence may be partly used, so the longer side is cut to the shorter one, and
the two agree when they are the same number of larger blocks.

Layers of the last blocks are read while the owner computes them, when nothing else is waiting
(`filling`).

The lease is renewed at a third of its term; the reader stops trusting it before the owner would, at
`LEASE_TRUST` of the term after the last message that kept it alive.

Knows no transport, no stream and no clock: times come in, effects go out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from baton.core.block import BlockId
from baton.core.errors import (
    BatonError,
    LeaseLost,
    PeerGone,
    RequestCancelled,
    TransferError,
    TransferTimeout,
)
from baton.core.lifecycle import TransferStats
from baton.core.request import TokenDelta
from kvtransfer.fetch_state import (
    Expected,
    FetchEffect,
    FetchKind,
    FetchState,
    Finish,
    StartRead,
    StopRead,
    ToOwner,
    TransferFailure,
    TransferResult,
)
from kvtransfer.filling import Filling
from kvtransfer.messages import (
    ChunkReady,
    Complete,
    FetchPrefix,
    Freeze,
    GiveUp,
    LayersRead,
    LayersReady,
    LeaseId,
    ReaderMessage,
    Renew,
    Takeover,
    Watch,
)
from kvtransfer.transport import ReadStats

LEASE_RENEWAL = 1 / 3
LEASE_TRUST = 0.8
MAX_WAIT_TERMS = 4
"""Lease terms during which the owner's blocks are held while ours do not come. Without a limit two
full pools could wait for each other: theirs held for requests that wait for ours, and ours held
for requests whose prompts wait for theirs."""


@dataclass(slots=True, eq=False)
class FetchMachine:
    """One request. Every method returns the effects to apply, in order."""

    expected: Expected
    link_grace_s: float
    """How long a broken stream to the owner may take to come back."""
    state: FetchState = FetchState.WATCHING
    stats: TransferStats = field(default_factory=TransferStats)
    _local: tuple[BlockId, ...] = ()
    """Our units, by position; empty before `reserved`."""
    _reserved_at_s: float = 0.0
    _remote: list[BlockId] = field(default_factory=list)
    """The owner's units announced so far, by position."""
    _num_requested: int = 0
    """Positions that are cached, read or in flight."""
    _num_read: int = 0
    """Positions that were read."""
    _in_flight: tuple[BlockId, ...] = ()
    _layers_in_flight: range | None = None
    """None: all of them."""
    _filling: Filling | None = None
    _read_started_s: float = 0.0
    _lease_id: LeaseId | None = None
    _lease_s: float = 0.0
    _lease_granted_s: float = 0.0
    _lease_kept_s: float = 0.0
    """When the lease was granted or last renewed."""
    _announced_all_s: float | None = None
    _first_token: TokenDelta | None = None
    _frozen_at_s: float | None = None
    """When the first Freeze was sent."""
    _is_freeze_sent: bool = False
    """On the present stream."""
    _link_lost_s: float | None = None

    def start(self) -> list[FetchEffect]:
        return [ToOwner(self._question())]

    def reserved(
        self, local: tuple[BlockId, ...], num_cached_blocks: int, now_s: float
    ) -> list[FetchEffect]:
        """Our blocks to read into; the first `num_cached_blocks` are valid and not read."""
        if self.state is not FetchState.WATCHING:
            return []
        self.state = FetchState.WAITING
        units = self.expected.units_per_block.local
        self._local, self._reserved_at_s = expanded(local, units), now_s
        if not 0 <= num_cached_blocks <= len(local):
            return self._fail(TransferError(f"{num_cached_blocks} cached of {len(local)}"), now_s)
        self._num_requested = num_cached_blocks * units
        misfit = self._misfit()
        return self._fail(TransferError(misfit), now_s) if misfit else self._advance(now_s)

    def chunk_ready(self, chunk: ChunkReady, now_s: float) -> list[FetchEffect]:
        """Announcements may repeat after a reconnect; they may not have gaps."""
        if self.state in (FetchState.ENDED, FetchState.COMPLETING):
            return []
        if chunk.epoch != self.expected.epoch or self._lease_id not in (None, chunk.lease_id):
            return self._fail(LeaseLost("the owner restarted or granted another lease"), now_s)
        units = self.expected.units_per_block.remote
        first, announced = chunk.first_block_index * units, expanded(chunk.block_ids, units)
        known = len(self._remote)
        if first > known:
            gap = f"chunk of block {chunk.first_block_index} does not continue {known // units}"
            return self._fail(TransferError(gap), now_s)
        if self._announced_all_s is not None and first + len(announced) > known:
            return self._fail(TransferError("blocks were announced after the last chunk"), now_s)
        if self._lease_id is None:
            self._lease_granted_s = now_s
        self._lease_id, self._lease_s, self._lease_kept_s = chunk.lease_id, chunk.lease_s, now_s
        if first + len(announced) > known:
            self._check_filling(chunk.fill_id, first, announced)
        self._remote += announced[known - first :]
        if chunk.is_last and self._announced_all_s is None:
            self._announced_all_s, self._first_token = now_s, chunk.first_token
        misfit = self._misfit()
        return self._fail(TransferError(misfit), now_s) if misfit else self._advance(now_s)

    def layers_ready(self, layers: LayersReady, now_s: float) -> list[FetchEffect]:
        """A hint: one that does not continue what is announced is of no use."""
        if self.state in (FetchState.ENDED, FetchState.COMPLETING):
            return []
        if self.expected.kind is not FetchKind.PROMPT or self._announced_all_s is not None:
            return []
        units = self.expected.units_per_block.remote
        first, remote = layers.first_block_index * units, expanded(layers.block_ids, units)
        if first != len(self._remote) or not 0 < layers.num_layers <= self.expected.num_layers:
            return []
        if layers.fill_id < 1:
            # A last chunk's 0 confirms nothing.
            return []
        if self._filling is None or not self._filling.is_same(layers.fill_id, remote):
            num_layers = self.expected.num_layers
            self._filling = Filling(layers.fill_id, first, remote, num_layers, 0)
        self._filling.num_ready = max(self._filling.num_ready, layers.num_layers)
        return self._advance(now_s)

    def _check_filling(self, fill_id: int, first: int, announced: tuple[BlockId, ...]) -> None:
        """What was read early counts exactly if this announcement vouches for it."""
        filling = self._filling
        if filling is not None and not filling.is_confirmed_by(fill_id, first, announced):
            self._filling = None

    def read_done(self, read: ReadStats, now_s: float) -> list[FetchEffect]:
        if self.state is not FetchState.READING:
            return []
        self.stats.num_bytes += read.num_bytes
        self.stats.num_reads += 1
        self.stats.seconds += now_s - self._read_started_s
        if self._announced_all_s is not None:
            # The owner computes nothing more of it: what is left of the read hides behind nothing.
            self.stats.exposed_seconds += now_s - max(self._announced_all_s, self._read_started_s)
        if self._layers_in_flight is None:
            self._count_read(len(self._in_flight))
        self._in_flight, self._layers_in_flight = (), None
        self.state = FetchState.WAITING
        return self._advance(now_s)

    def _count_read(self, num_units: int) -> None:
        self._num_read += num_units
        self.stats.num_blocks = -(-self._num_read // self.expected.units_per_block.local)

    def read_failed(self, error: TransferError, now_s: float) -> list[FetchEffect]:
        """A read that passed its deadline may still land; any other error means it cannot."""
        if self.state is not FetchState.READING:
            return []
        if not isinstance(error, TransferTimeout):
            self._in_flight = ()
        # The transport is done with this read: there is nothing left to stop.
        return self._fail(error, now_s, stop_read=False)

    def completed(self, lease_id: LeaseId, *, valid: bool, now_s: float) -> list[FetchEffect]:
        if self.state is not FetchState.COMPLETING or lease_id != self._lease_id:
            return []
        if not valid:
            return self._fail(LeaseLost("the lease ended before the read was validated"), now_s)
        self.state = FetchState.ENDED
        num_valid = min(len(self._remote), len(self._local))
        return [
            Finish(
                TransferResult(
                    self.expected.request_id,
                    self._first_token,
                    self.stats,
                    self._reserved_at_s,
                    now_s,
                    self.expected.kind,
                    -(-num_valid // self.expected.units_per_block.local),
                    0.0 if self._frozen_at_s is None else now_s - self._frozen_at_s,
                )
            )
        ]

    def refused(self, reason: str, now_s: float) -> list[FetchEffect]:
        return self._fail(LeaseLost(f"the owner refused: {reason}"), now_s, tell_owner=False)

    def cancel(self, reason: str, now_s: float) -> list[FetchEffect]:
        return self._fail(RequestCancelled(reason), now_s)

    def link_lost(self, now_s: float) -> list[FetchEffect]:
        """The stream to the owner broke; reads go on, the owner keeps the lease for a while."""
        if self._link_lost_s is None:
            self._link_lost_s = now_s
        return self.tick(now_s)

    def link_restored(self, now_s: float) -> list[FetchEffect]:
        """A new stream to the same process. Ask again for what may have been lost."""
        if self.state is FetchState.ENDED:
            return []
        self._link_lost_s = None
        if self.state is FetchState.COMPLETING:
            return [ToOwner(self._complete_message())]
        # Freeze follows the answer, should it still be needed.
        self._is_freeze_sent = False
        return [ToOwner(self._question()), *self.tick(now_s)]

    def peer_gone(self, error: PeerGone, now_s: float) -> list[FetchEffect]:
        """The link to the owner has ended for good, most likely with its process.

        A read in flight learns that from the transport, or lands: nobody is left to vouch for it.
        """
        if self.state is FetchState.READING:
            return self.link_lost(now_s)
        return self._fail(error, now_s, tell_owner=False)

    def tick(self, now_s: float) -> list[FetchEffect]:
        """Let time pass: deadline, lease, broken link."""
        if self.state is FetchState.ENDED:
            return []
        if now_s >= self.expected.deadline_s:
            late = f"KV of {self.expected.request_id} did not arrive in time ({self.state.value})"
            return self._fail(TransferTimeout(late), now_s)
        if self._link_lost_s is not None:
            if now_s - self._link_lost_s < self.link_grace_s:
                return []
            gone = f"no stream to {self.expected.peer} for {self.link_grace_s:g} s"
            return self._fail(PeerGone(gone), now_s)
        return [] if self._lease_id is None else self._keep_lease(self._lease_id, now_s)

    def check_integrity(self) -> None:
        """Raises AssertionError when the counts contradict the state."""
        assert bool(self._in_flight) == (self.state is FetchState.READING) or (
            self.state is FetchState.ENDED
        )
        assert self.state is FetchState.ENDED or not self._misfit()
        assert self._num_requested <= len(self._local)
        assert 0.0 <= self.stats.exposed_seconds <= self.stats.seconds
        if self.state is FetchState.WATCHING:
            assert not self._local
        if self.state is FetchState.COMPLETING:
            assert self._lease_id is not None and self._announced_all_s is not None
            assert self._num_requested >= min(len(self._remote), len(self._local))

    def _question(self) -> ReaderMessage:
        expected = self.expected
        match expected.kind:
            case FetchKind.PROMPT:
                return Watch(expected.request_id)
            case FetchKind.PREFIX:
                return FetchPrefix(expected.request_id, expected.block_hashes)
            case FetchKind.TAKEOVER:
                return Takeover(expected.request_id, expected.num_known_tokens)

    def _keep_lease(self, lease_id: LeaseId, now_s: float) -> list[FetchEffect]:
        age_s = now_s - self._lease_kept_s
        if age_s > self._lease_s * LEASE_TRUST:
            stale = f"lease not renewed for {age_s:.1f} of its {self._lease_s:g} s"
            return self._fail(LeaseLost(stale), now_s)
        if self.state is FetchState.WATCHING:
            waited_s = now_s - self._lease_granted_s
            if waited_s >= self._lease_s * MAX_WAIT_TERMS:
                long = f"no free blocks here for {waited_s:.0f} s after the first were announced"
                return self._fail(LeaseLost(long), now_s)
        if age_s >= self._lease_s * LEASE_RENEWAL:
            self._lease_kept_s = now_s
            return [ToOwner(Renew(lease_id))]
        return []

    def _misfit(self) -> str:
        """How the announced blocks contradict the reserved ones; empty while they do not."""
        if self.state is FetchState.WATCHING:
            return ""
        larger = max(self.expected.units_per_block)
        announced = -(-len(self._remote) // larger)
        wanted = -(-len(self._local) // larger)
        is_exact = self.expected.kind is FetchKind.PROMPT and self._announced_all_s is not None
        if announced == wanted or (announced < wanted and not is_exact):
            return ""
        if self.expected.kind is FetchKind.TAKEOVER:
            return f"the request has grown to {announced} blocks, {wanted} are reserved here"
        return f"the owner announced {announced} blocks, {wanted} are expected"

    def _advance(self, now_s: float) -> list[FetchEffect]:
        """Start the next read, or ask for what comes after the last one."""
        if self.state is not FetchState.WAITING:
            return []
        first, end = self._num_requested, min(len(self._remote), len(self._local))
        filling = self._filling
        if filling is not None and first >= end and self._announced_all_s is None:
            end = min(filling.first + len(filling.remote), len(self._local))
            return self._read_layers(filling, first, end, now_s)
        if self._lease_id is None:
            return []
        if first < end:
            self._num_requested = end
            layers = None
            if filling is not None and filling.num_read:
                layers = filling.rest
                self._count_read(end - first)
            if layers is None or layers:
                return self._read(self._remote[first:end], first, end, layers, now_s)
        if self._announced_all_s is not None:
            self.state = FetchState.COMPLETING
            return [ToOwner(self._complete_message())]
        if self.expected.kind is not FetchKind.TAKEOVER or self._is_freeze_sent:
            return []
        self._is_freeze_sent = True
        if self._frozen_at_s is None:
            self._frozen_at_s = now_s
        return [ToOwner(Freeze(self.expected.request_id))]

    def _read(
        self,
        remote: Sequence[BlockId],
        first: int,
        end: int,
        layers: range | None,
        now_s: float,
    ) -> list[FetchEffect]:
        self._in_flight, self._layers_in_flight = self._local[first:end], layers
        self._read_started_s = now_s
        self.state = FetchState.READING
        return [StartRead(tuple(remote), self._in_flight, layers)]

    def _read_layers(
        self, filling: Filling, first: int, end: int, now_s: float
    ) -> list[FetchEffect]:
        """Those that are complete and not here yet, of blocks that are not announced."""
        if first < end and (layers := filling.take_ready()):
            return self._read(filling.units(first, end), first, end, layers, now_s)
        if filling.rest or filling.is_told:
            return []
        filling.is_told = True
        return [ToOwner(LayersRead(self.expected.request_id, filling.fill_id))]

    def _complete_message(self) -> Complete:
        assert self._lease_id is not None
        return Complete(self._lease_id, self.expected.epoch)

    def _fail(
        self, error: BatonError, now_s: float, *, tell_owner: bool = True, stop_read: bool = True
    ) -> list[FetchEffect]:
        if self.state is FetchState.ENDED:
            return []
        was_reading = self.state is FetchState.READING
        self.state = FetchState.ENDED
        effects: list[FetchEffect] = []
        if tell_owner:
            effects.append(ToOwner(GiveUp(self.expected.request_id, str(error))))
        if was_reading and stop_read:
            effects.append(StopRead())
        unsettled = contracted(self._in_flight, self.expected.units_per_block.local)
        failure = TransferFailure(self.expected.request_id, error, unsettled, self.expected.kind)
        return [*effects, Finish(failure)]


def expanded(block_ids: Iterable[BlockId], units_per_block: int) -> tuple[BlockId, ...]:
    """The units of these blocks, in order."""
    if units_per_block == 1:
        return tuple(block_ids)
    return tuple(
        BlockId(block_id * units_per_block + unit)
        for block_id in block_ids
        for unit in range(units_per_block)
    )


def contracted(units: Iterable[BlockId], units_per_block: int) -> tuple[BlockId, ...]:
    """The blocks these units belong to, each once, in order."""
    return tuple(dict.fromkeys(BlockId(unit // units_per_block) for unit in units))
