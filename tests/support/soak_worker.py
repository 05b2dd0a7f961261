"""One worker of the soak: a real engine, owner and fetcher in one process with virtual time.

What `services/worker` does between them with threads and streams is played here with queues: the
engine's thread is `turn`, which runs the commands that wait and takes one step; the event loop is
`deliver`, which hands on what the engine said. The KV of a token is eight bytes of real memory, so
that reads move it as they would between processes.
"""

from __future__ import annotations

import importlib.util
import sys
from array import array
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from baton.core.block import BlockHash, BlockId
from baton.core.clock import ManualClock
from baton.core.errors import BatonError, InternalError, RequestError, TransferError
from baton.core.kv_layout import KvLayout
from baton.core.request import FinishReason, GenerateRequest, RequestId, TokenDelta, Work
from baton.core.worker_info import Epoch, WorkerId
from baton.engine.block_state import BlockState
from baton.engine.engine import Engine, Reservation, StepOutput
from kvtransfer.fake_transport import FakeFabric, FakeRead
from kvtransfer.fetch_state import FetchKind, FetchLimits, TransferFailure, TransferResult
from kvtransfer.fetcher import Fetcher
from kvtransfer.messages import OwnerMessage, ReaderMessage
from kvtransfer.owner import (
    FinishHandover,
    FreezeRequest,
    LeaseOwner,
    LeasePrefix,
    OwnerEffect,
    OwnerLimits,
    ReaderId,
    ReleaseLease,
    ResumeRequest,
    Send,
    StartHandover,
)
from kvtransfer.transport import PoolRegion

BLOCK_SIZE = 4
VOCAB = 61
LAYOUT = KvLayout("soak", 1, 1, 1, BLOCK_SIZE, "float32")
"""K and V of four bytes each: the eight bytes of a token."""
OWNER_LIMITS = OwnerLimits(
    lease_s=6.0, held_s=60.0, watch_s=20.0, takeover_s=30.0, frozen_s=3.0, ended_s=30.0
)
# The fetcher's own ticker never comes round: virtual time is told by `tick`.
FETCH_LIMITS = FetchLimits(read_timeout_s=1e6, link_grace_s=2.0, tick_s=1e6)
_FAILED = (FinishReason.CANCELLED, FinishReason.ERROR)


def load_engine_helper(name: str) -> ModuleType:
    """A helper file of the engine's tests."""
    qualified = f"engine_test_{name}"
    if qualified not in sys.modules:
        path = Path(__file__).parents[1] / "engine" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(qualified, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[qualified] = module
        spec.loader.exec_module(module)
    return sys.modules[qualified]


class Wire(Protocol):
    """Router and streams, as a worker sees them."""

    events: Counter[str]

    def on_delta(self, worker: Worker, delta: TokenDelta) -> None: ...
    def to_owner(self, reader: Worker, owner: WorkerId, message: ReaderMessage) -> None: ...
    def to_reader(self, owner: Worker, reader: ReaderId, message: OwnerMessage) -> None: ...


@dataclass(slots=True, eq=False)
class _Record:
    request: GenerateRequest
    is_wanted: bool = True
    is_reserved: bool = False


class Worker:
    """One life of one worker. Also the fetcher's link and sink."""

    def __init__(
        self,
        worker_id: WorkerId,
        epoch: Epoch,
        *,
        fabric: FakeFabric,
        clock: ManualClock,
        wire: Wire,
        num_blocks: int,
        depth: int,
    ) -> None:
        self.worker_id, self.epoch = worker_id, epoch
        self.reader_id = ReaderId(f"{worker_id}@{epoch}")
        self._wire = wire
        self.engine, self.runner = _make_engine(num_blocks, depth, clock)
        self.memory: array[int] = self.runner.slots
        address, num_slots = self.memory.buffer_info()
        region = PoolRegion(address, num_slots * self.memory.itemsize, num_blocks, LAYOUT)
        self.transport = fabric.transport(worker_id, epoch, region)
        self.transport.is_held = True
        self.owner = LeaseOwner(epoch=epoch, clock=clock, limits=OWNER_LIMITS)
        self.fetcher = Fetcher(
            transport=self.transport, link=self, sink=self, clock=clock, limits=FETCH_LIMITS
        )
        self.commands: deque[Callable[[], None]] = deque()
        self.results: deque[Callable[[], None]] = deque()
        self.live: dict[RequestId, _Record] = {}
        self.imports: dict[RequestId, Reservation] = {}
        self.withheld: set[BlockId] = set()
        self.is_dead = False

    # The engine's thread.

    def turn(self) -> None:
        while self.commands:
            self.commands.popleft()()
        if self.engine.has_work:
            output = self.engine.step()
            self.results.append(lambda: self._on_step(output))
        assert not self.runner.violations, self.runner.violations[0]

    def _ask(self, command: Callable[[], object], failed: Callable[[str], None] | None) -> None:
        """What an engine refuses has no effect but `failed`; a defect ends the test."""

        def run() -> None:
            try:
                command()
            except InternalError:
                raise
            except BatonError as error:
                reason = str(error)
                self._wire.events["engine refusals"] += 1
                if failed is not None:
                    self.results.append(lambda: failed(reason))

        self.commands.append(run)

    # The event loop.

    def deliver(self) -> None:
        if self.results:
            self.results.popleft()()

    def submit(self, request: GenerateRequest) -> None:
        request_id = request.request_id
        record = self.live[request_id] = _Record(request)
        if request.work.reads_all_kv and not self._expect(request):
            return

        def submit() -> None:
            try:
                self.engine.submit(request)
            except RequestError as error:
                delta = _failure(request_id, str(error))
                self.results.append(lambda: self._on_last(record, delta))

        self.commands.append(submit)

    def cancel(self, request_id: RequestId) -> None:
        record = self.live.get(request_id)
        if record is None:
            self.apply(self.owner.request_failed(request_id, "cancelled"))
            return
        record.is_wanted = False
        self._stop(record)

    def fetch_prefix(self, fetch_id: RequestId, owner: Worker, hashes: list[BlockHash]) -> None:
        def reserve() -> None:
            reservation = self.engine.reserve_import(fetch_id, hashes)
            if reservation is not None:
                self.results.append(lambda: self._import(reservation, owner, hashes))

        self._ask(reserve, None)

    def tick(self) -> None:
        self.apply(self.owner.tick())
        self.fetcher.tick()

    def apply(self, effects: list[OwnerEffect]) -> None:
        for effect in effects:
            match effect:
                case Send(reader, message):
                    self._wire.to_reader(self, reader, message)
                case ReleaseLease(request_id):
                    self._call(self.engine.release_lease, request_id)
                case LeasePrefix():
                    self._ask(_bound(self._lease_prefix, effect), None)
                case StartHandover(request_id, num_known_tokens):
                    self._ask(
                        _bound(
                            self.engine.start_handover,
                            request_id,
                            num_known_tokens=num_known_tokens,
                        ),
                        _bound(self._handover_failed, request_id),
                    )
                case FreezeRequest(request_id):
                    self._call(self.engine.freeze, request_id)
                case ResumeRequest(request_id):
                    self._wire.events["resumes"] += 1
                    self._call(self.engine.resume, request_id)
                    ended = _bound(self.owner.handover_ended, request_id)
                    self.commands.append(lambda f=ended: self.results.append(_bound(self._do, f)))
                case FinishHandover(request_id):
                    self._wire.events["handed on"] += 1
                    self._call(self.engine.finish_handover, request_id)

    # The fetcher's link and sink.

    def send(self, peer: WorkerId, message: ReaderMessage) -> None:
        if not self.is_dead:
            self._wire.to_owner(self, peer, message)

    def transfer_finished(self, result: TransferResult) -> None:
        self._wire.events[f"{result.kind.value} arrived"] += 1
        request_id = result.request_id
        if result.kind is FetchKind.PREFIX:
            reservation = self.imports.pop(request_id)
            num_blocks = reservation.num_cached_blocks + result.num_blocks
            self._call(self.engine.finish_import, request_id, num_blocks=num_blocks)
            return
        record = self.live[request_id]
        assert record.is_reserved and result.first_token is not None
        first = result.first_token
        record.is_reserved = False
        self._ask(
            _bound(self.engine.activate, request_id, first), _bound(self._not_activated, record)
        )
        if first.finish_reason is not None or not record.is_wanted:
            del self.live[request_id]

    def transfer_failed(self, failure: TransferFailure) -> None:
        if self.is_dead:
            return
        self._wire.events[f"{failure.kind.value} failed"] += 1
        request_id, unsettled = failure.request_id, failure.unsettled
        assert not self.withheld & set(unsettled)
        self.withheld.update(unsettled)
        if failure.kind is FetchKind.PREFIX:
            del self.imports[request_id]
            self._call(self.engine.abandon_import, request_id, unsettled=unsettled)
            return
        record = self.live[request_id]
        if record.is_reserved:
            record.is_reserved = False
            self._call(self.engine.abandon, request_id, unsettled=unsettled)
            self._on_last(record, _failure(request_id, str(failure.error)))
        else:
            assert not unsettled
            self._tell(record, _failure(request_id, str(failure.error)))
            record.is_wanted = False
            self._call(self.engine.cancel, request_id)

    def blocks_settled(self, block_ids: list[BlockId]) -> None:
        if self.is_dead:
            return
        assert set(block_ids) <= self.withheld
        self.withheld.difference_update(block_ids)
        self._call(self.engine.recover, block_ids)

    def land(self, read: FakeRead) -> None:
        """Reads may only write where nobody else does, late ones too."""
        blocks = self.engine._pool.blocks()
        states = {blocks[block_id].state for block_id in read.local_blocks}
        expected = {BlockState.RESERVED}
        if read.is_given_up:
            self._wire.events["late writes"] += 1
            # Until the engine has heard of it, a withheld block is still reserved.
            expected.add(BlockState.QUARANTINED)
        is_withheld = set(read.local_blocks) <= self.withheld
        if not states <= expected or is_withheld != read.is_given_up:
            self._wire.events["writes into blocks in use"] += 1
        self.transport.finish(read)

    # Inside.

    def _do(self, effects: Callable[[], list[OwnerEffect]]) -> None:
        self.apply(effects())

    def _call(self, method: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        self._ask(_bound(method, *args, **kwargs), None)

    def _not_activated(self, record: _Record, reason: str) -> None:
        self._wire.events["not activated"] += 1
        request_id = record.request.request_id
        self._call(self.engine.abandon, request_id, unsettled=())
        self._on_last(record, _failure(request_id, reason))

    def _handover_failed(self, request_id: RequestId, reason: str) -> None:
        self.apply(self.owner.handover_failed(request_id, reason))

    def _lease_prefix(self, wanted: LeasePrefix) -> None:
        block_ids = self.engine.lease_prefix(wanted.request_id, wanted.block_hashes)
        self.results.append(
            lambda: self.apply(
                self.owner.prefix_leased(wanted.reader, wanted.request_id, block_ids)
            )
        )

    def _import(self, reservation: Reservation, owner: Worker, hashes: Sequence[BlockHash]) -> None:
        fetch_id, first = reservation.request_id, reservation.num_cached_blocks
        self.imports[fetch_id] = reservation
        try:
            self.fetcher.fetch_prefix(
                fetch_id,
                peer=owner.worker_id,
                epoch=owner.epoch,
                block_hashes=hashes[first : len(reservation.block_ids)],
                local=reservation.block_ids[first:],
                timeout_s=20.0,
            )
        except TransferError:
            del self.imports[fetch_id]
            self._call(self.engine.abandon_import, fetch_id, unsettled=())

    def _expect(self, request: GenerateRequest) -> bool:
        assert request.kv_source is not None
        is_takeover = request.work is Work.TAKEOVER
        try:
            self.fetcher.expect(
                request.request_id,
                peer=request.kv_source.worker_id,
                epoch=request.kv_source.epoch,
                timeout_s=request.deadline_s,
                kind=FetchKind.TAKEOVER if is_takeover else FetchKind.PROMPT,
                num_known_tokens=len(request.output_token_ids),
            )
        except TransferError as error:
            record = self.live[request.request_id]
            delta = _failure(request.request_id, str(error))
            self.results.append(lambda: self._on_last(record, delta))
            return False
        return True

    def _on_step(self, output: StepOutput) -> None:
        for chunk in output.chunks:
            self.apply(
                self.owner.chunk_done(
                    chunk.request_id,
                    first_block_index=chunk.first_block_index,
                    block_ids=chunk.block_ids,
                    is_last=chunk.is_last,
                    first_token=chunk.first_token,
                )
            )
        for delta in output.deltas:
            record = self.live.get(delta.request_id)
            if record is not None and delta.timeline is None:
                self._tell(record, delta)
            elif record is not None:
                self._on_last(record, delta)
        for request_id in output.handovers_ended:
            self.apply(self.owner.request_ended(request_id, "it has ended, or was preempted"))
        for reservation in output.reservations:
            self._on_reservation(reservation)

    def _on_reservation(self, reservation: Reservation) -> None:
        record = self.live.get(reservation.request_id)
        if record is None or not record.is_wanted:
            self._call(self.engine.abandon, reservation.request_id, unsettled=())
            self.live.pop(reservation.request_id, None)
            return
        record.is_reserved = True
        self.fetcher.reserved(
            reservation.request_id,
            reservation.block_ids,
            num_cached_blocks=reservation.num_cached_blocks,
        )

    def _on_last(self, record: _Record, delta: TokenDelta) -> None:
        request_id, work = record.request.request_id, record.request.work
        is_unwanted = not record.is_wanted or delta.finish_reason in _FAILED
        self._tell(record, delta)
        record.is_wanted = False
        if work is Work.PREFILL and is_unwanted:
            self.apply(self.owner.request_failed(request_id, "it has failed or was cancelled"))
        if work.reads_all_kv:
            self.fetcher.cancel(request_id, "it has ended")
        if not record.is_reserved and self.live.get(request_id) is record:
            del self.live[request_id]

    def _stop(self, record: _Record) -> None:
        request_id = record.request.request_id
        is_in_engine = not record.is_reserved
        if record.request.work.reads_all_kv:
            self.fetcher.cancel(request_id, "cancelled")
        if is_in_engine:
            self._call(self.engine.cancel, request_id)

    def _tell(self, record: _Record, delta: TokenDelta) -> None:
        if record.is_wanted:
            self._wire.on_delta(self, delta)


def _make_engine(num_blocks: int, depth: int, clock: ManualClock) -> tuple[Engine, Any]:
    runner = load_engine_helper("fake_runner").FakeRunner(
        num_blocks, BLOCK_SIZE, VOCAB, max_in_flight=depth
    )
    runner.slots = array("q", runner.slots)
    engine = load_engine_helper("harness").make_engine(
        runner,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        clock=clock,
        max_model_len=96,
        max_num_seqs=6,
        max_num_batched_tokens=16,
    )
    runner.block_pool = engine._pool
    return engine, runner


def _bound(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
    return lambda *more: function(*args, *more, **kwargs)


def _failure(request_id: RequestId, reason: str) -> TokenDelta:
    return TokenDelta(request_id, finish_reason=FinishReason.ERROR, error=reason, is_retryable=True)
