"""A router over scripted workers: real gRPC on loopback, arithmetic instead of a model.

Token k of any output is `letter(sum(prompt) + seed + k)`, so every test can say what must come
out, whichever workers produced it. A decode worker starts once its prefill peer has computed the
prompt and is alive. A takeover goes through `TAKEOVER_PHASES`, one per step; the old worker stands
still from "frozen" on, and goes on when the new one fails, is cancelled or dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from baton.core.block import BlockHash, join_hashes
from baton.core.errors import BatonError, Overloaded
from baton.core.fabric import FabricReport
from baton.core.kv_layout import KvLayout
from baton.core.lifecycle import LifecycleEvent, Timeline, TransferStats
from baton.core.request import (
    FinishReason,
    GenerateRequest,
    PeerRef,
    RequestId,
    SamplingParams,
    TokenDelta,
    TokenLogprobs,
    Work,
)
from baton.core.worker_info import Epoch, LoadReport, Role, WorkerId, WorkerInfo
from baton.rpc.channel import new_server
from baton.rpc.convert import (
    delta_to_wire,
    fabric_to_wire,
    hashing_to_wire,
    load_to_wire,
    peer_from_wire,
    request_from_wire,
    worker_info_to_wire,
)
from baton.rpc.v1 import worker_pb2 as pb
from baton.rpc.v1 import worker_pb2_grpc as pb_grpc
from services.router.config import (
    DispatchConfig,
    MigrationConfig,
    PolicyConfig,
    RouterConfig,
    SessionConfig,
)
from services.router.core import RouterCore
from services.router.requests.generation import GenerationDelta, GenerationInput, Usage
from services.router.workers.membership import PushMembership
from services.worker.last_delta import handed_back, refusal

LAYOUT = KvLayout("fake", 1, 1, 8, 16, "float32")
MODEL = "fake"
EOS = 0
MAX_MODEL_LEN = 4096


def letter(number: int) -> int:
    return ord("a") + number % 26


def expected_ids(prompt: Sequence[int], num_tokens: int, seed: int = 0) -> list[int]:
    base = sum(prompt) + seed
    return [letter(base + k) for k in range(num_tokens)]


def expected_text(prompt: Sequence[int], num_tokens: int, seed: int = 0) -> str:
    return bytes(expected_ids(prompt, num_tokens, seed)).decode()


class ByteDetokenizer:
    """Ids are bytes."""

    def __init__(self) -> None:
        import codecs

        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Iterable[int]) -> str:
        return self._decoder.decode(bytes(token_ids))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteTokenizer:
    """Stands in for baton.engine.tokenizer.Tokenizer."""

    eos_token_ids = (EOS,)
    vocab_size = 256

    def detokenizer(
        self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> ByteDetokenizer:
        return ByteDetokenizer()


TAKEOVER_SLACK_TOKENS = 64
"""Room on the new worker for what the old one generates meanwhile."""
TAKEOVER_PHASES = ("reading", "frozen", "complete")
"""Of a takeover on its target: D1 generates, D1 stands still, all is read."""
HANDED_ON = "handed on"
"""D1 has let go, and D2 has not spoken."""


class FakeKv:
    """What prefill workers hold for readers: wire id -> worker; and who can be read from."""

    def __init__(self) -> None:
        self.workers: dict[WorkerId, FakeWorker] = {}
        self.held: dict[tuple[WorkerId, RequestId], bool] = {}
        self.dead: set[tuple[WorkerId, Epoch]] = set()


@dataclass
class Faults:
    """What a worker does wrong. Positions are output positions."""

    kill_at: int | None = None
    """Die instead of sending this token."""
    kills_left: int = 10**9
    """Of all workers that share this object."""
    kill_on_submit: bool = False
    error_at: int | None = None
    """Send an error delta instead of this token."""
    error_is_retryable: bool = True
    errors_left: int = 10**9
    skip_at: int | None = None
    """Leave out this token: a gap."""
    is_stalled: bool = False
    """Reports load, computes nothing."""
    is_frozen: bool = False
    """Sends nothing at all, like a stopped process."""
    hold_kv: bool = False
    """Decode never gets the KV."""
    refuse: str = ""
    is_full: bool = False
    """Refuses for want of room."""
    welcome_delay_s: float = 0.0
    forgets_the_end: bool = False
    """The last token comes without its finish reason."""
    takeover_stays_in: str = ""
    """Takeovers by this worker do not leave this phase."""
    takeover_fails_in: str = ""
    """They end with an error when they reach this phase."""
    write_delay_s: float = 0.0
    """Every message of the worker arrives this much later."""


@dataclass
class Live:
    request: GenerateRequest
    index: int
    session: asyncio.Queue[pb.WorkerMessage]
    has_spoken: bool = False
    phase: str = TAKEOVER_PHASES[0]
    """Of a takeover by this worker."""
    is_frozen: bool = False
    """Another worker is about to take it over."""


class FakeWorker(pb_grpc.WorkerServicer):
    """One scripted worker. `start`, `kill`, `revive`."""

    def __init__(self, name: str, role: Role, kv: FakeKv, *, step_s: float = 0.002) -> None:
        self.worker_id = WorkerId(name)
        self.role = role
        self.kv = kv
        kv.workers[self.worker_id] = self
        self.step_s = step_s
        self.faults = Faults()
        self.epoch = Epoch("1")
        self.port = 0
        self.live: dict[RequestId, Live] = {}
        self.submitted: list[GenerateRequest] = []
        self.cancelled: list[RequestId] = []
        self.peers: list[list[PeerRef]] = []
        """Every message about peers."""
        self.load = LoadReport(free_blocks=1000, total_blocks=1000)
        self.cached: list[BlockHash] = []
        self.on_host: list[BlockHash] = []
        self.on_disk: list[BlockHash] = []
        self.hashing: pb.BlockHashing | None = None
        self.num_left_out = 0
        """What it says of how it names blocks; None: the truth."""
        self.kv_sequence = 0
        self.num_get_info = 0
        self.eos_at: int | None = None
        self.role_version = 1
        self.num_stale = 0
        """Requests that were meant for an earlier role."""
        self.max_model_len = MAX_MODEL_LEN
        self.layout = LAYOUT
        self.tokens_of: Callable[[GenerateRequest, int], int] = lambda r, k: letter(
            sum(r.prompt_token_ids) + (r.sampling.seed or 0) + k
        )
        self.sessions: list[asyncio.Queue[pb.WorkerMessage]] = []
        self._server: grpc.aio.Server | None = None
        self._stepping: asyncio.Task[None] | None = None
        self._dying: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def is_alive(self) -> bool:
        return self._server is not None

    @property
    def info(self) -> WorkerInfo:
        return WorkerInfo(
            self.worker_id, self.epoch, self.role, self.address, MODEL, self.layout,
            1000, self.max_model_len, 32, "fake", 1, self.role_version,
        )  # fmt: skip

    async def start(self) -> None:
        server = new_server()
        pb_grpc.add_WorkerServicer_to_server(self, server)
        self.port = server.add_insecure_port(f"127.0.0.1:{self.port}")
        await server.start()
        self._server = server
        self._stepping = asyncio.create_task(self._run())

    async def kill(self) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        self.kv.dead.add((self.worker_id, self.epoch))
        for live in self.live.values():
            self._let_go(live)
        self.live.clear()
        self.sessions.clear()
        if self._stepping is not None:
            self._stepping.cancel()
        await server.stop(grace=None)

    async def revive(self) -> None:
        self.epoch = Epoch(str(int(self.epoch) + 1))
        self.faults = Faults()
        self.load = LoadReport(free_blocks=1000, total_blocks=1000)
        self.kv_sequence = 0
        self.cached.clear()
        await self.start()

    async def close(self) -> None:
        if self._dying is not None:
            await self._dying
        await self.kill()

    def die(self) -> None:
        """kill() from inside a step."""
        self._dying = self._dying or asyncio.create_task(self.kill())

    def send_all(self, message: pb.WorkerMessage) -> None:
        for queue in self.sessions:
            queue.put_nowait(message)

    def change_role(self, *, is_told: bool = True) -> None:
        """Serve in the other pool; the routers hear of it, or have yet to."""
        self.role, self.role_version = self.role.other, self.role_version + 1
        if is_told:
            self.tell_role()

    def tell_role(self) -> None:
        self.send_all(pb.WorkerMessage(info=worker_info_to_wire(self.info)))

    def hand_back(self) -> None:
        """All that runs here, to be placed anew; the worker takes no more."""
        self.set_load(is_draining=True)
        for wire_id, live in list(self.live.items()):
            del self.live[wire_id]
            self._let_go(live)
            self._send(live.session, handed_back(wire_id, "the worker leaves its pool"))

    def set_load(self, **values: object) -> None:
        """Change the load and report it."""
        self.load = dataclasses.replace(self.load, **values)  # type: ignore[arg-type]
        self.report()

    def report_fabric(self, report: FabricReport) -> None:
        self.send_all(pb.WorkerMessage(fabric=fabric_to_wire(report)))

    def report(self, **kv: object) -> None:
        self.send_all(
            pb.WorkerMessage(step=pb.StepBatch(load=load_to_wire(self.load), **kv))  # type: ignore[arg-type]
        )

    def store(self, hashes: Sequence[BlockHash], *, skip: int = 0) -> None:
        """Announce stored blocks; `skip` loses that many event numbers."""
        self.cached += hashes
        self.kv_sequence += 1 + skip
        self.report(
            first_kv_sequence=self.kv_sequence,
            kv_events=[pb.KvEvent(stored=join_hashes(hashes))],
        )

    # gRPC

    def _welcome(self) -> pb.Welcome:
        return pb.Welcome(
            info=worker_info_to_wire(self.info),
            load=load_to_wire(self.load),
            kv_sequence=self.kv_sequence,
            cached_hashes=join_hashes(self.cached),
            host_hashes=join_hashes(self.on_host),
            disk_hashes=join_hashes(self.on_disk),
            hashing=self.hashing or hashing_to_wire(self.layout),
            num_left_out=self.num_left_out,
        )

    async def GetInfo(self, request: pb.GetInfoRequest, context: object) -> pb.Welcome:
        self.num_get_info += 1
        return self._welcome()

    async def Session(
        self, messages: AsyncIterator[pb.RouterMessage], context: grpc.aio.ServicerContext
    ) -> None:
        hello = await anext(messages)
        assert hello.WhichOneof("body") == "hello"
        while self.faults.is_frozen:
            await asyncio.sleep(0.02)
        await asyncio.sleep(self.faults.welcome_delay_s)
        await context.write(pb.WorkerMessage(welcome=self._welcome()))
        queue: asyncio.Queue[pb.WorkerMessage] = asyncio.Queue()
        self.sessions.append(queue)
        reader = asyncio.create_task(self._read(messages, queue))
        try:
            while not reader.done():
                with contextlib.suppress(TimeoutError):
                    message = await asyncio.wait_for(queue.get(), 0.1)
                    while self.faults.is_frozen:
                        await asyncio.sleep(0.02)
                    if self.faults.write_delay_s:
                        await asyncio.sleep(self.faults.write_delay_s)
                    await context.write(message)
        finally:
            reader.cancel()
            if queue in self.sessions:
                self.sessions.remove(queue)
            for wire_id in [i for i, live in self.live.items() if live.session is queue]:
                self._let_go(self.live.pop(wire_id))

    async def _read(
        self,
        messages: AsyncIterator[pb.RouterMessage],
        queue: asyncio.Queue[pb.WorkerMessage],
    ) -> None:
        async for message in messages:
            while self.faults.is_frozen:
                await asyncio.sleep(0.02)
            body = message.WhichOneof("body")
            if body == "submit":
                if message.submit.role_version != self.role_version:
                    self.num_stale += 1
                    wire_id = RequestId(message.submit.request_id)
                    self.tell_role()
                    self._send(queue, handed_back(wire_id, "meant for another role"))
                    continue
                self._submit(request_from_wire(message.submit), queue)
            elif body == "peers":
                self.peers.append([peer_from_wire(peer) for peer in message.peers.peers])
            else:
                assert body == "cancel"
                self._cancel(RequestId(message.cancel.request_id))

    def _submit(self, request: GenerateRequest, queue: asyncio.Queue[pb.WorkerMessage]) -> None:
        assert request.request_id not in self.live, "a wire id was used twice"
        self.submitted.append(request)
        if self.faults.kill_on_submit:
            self.die()
        elif self.faults.refuse:
            self._send(queue, self._error(request.request_id, self.faults.refuse, True))
        elif self.faults.is_full:
            self._send(queue, refusal(request.request_id, Overloaded("the queue is full")))
        else:
            index = len(request.output_token_ids) + (request.work is Work.DECODE)
            self.live[request.request_id] = Live(request, index, queue)

    def _cancel(self, wire_id: RequestId) -> None:
        self.cancelled.append(wire_id)
        self.kv.held.pop((self.worker_id, wire_id), None)
        live = self.live.pop(wire_id, None)
        if live is not None:
            self._let_go(live)
            self._send(live.session, TokenDelta(wire_id, finish_reason=FinishReason.CANCELLED))

    # The "engine"

    async def _run(self) -> None:
        ticks = 0
        while True:
            await asyncio.sleep(self.step_s)
            ticks += 1
            if not self.faults.is_stalled:
                for live in list(self.live.values()):
                    self._step(live)
            if ticks * self.step_s >= 0.1:
                ticks = 0
                self.report()

    def _step(self, live: Live) -> None:
        request, faults = live.request, self.faults
        if live.is_frozen:
            return
        if request.work is Work.DECODE and not live.has_spoken and not self._read_kv(live):
            return
        if request.work is Work.TAKEOVER and not live.has_spoken and not self._take_over(live):
            return
        k = live.index
        if faults.kill_at == k and faults.kills_left:
            faults.kills_left -= 1
            self.die()
            return
        if faults.error_at == k and faults.errors_left:
            faults.errors_left -= 1
            del self.live[request.request_id]
            error = self._error(request.request_id, "scripted", faults.error_is_retryable)
            self._send(live.session, error)
            return
        if faults.skip_at == k:
            k = live.index = k + 1
        self._send(live.session, self._token(live, k))
        live.has_spoken = True
        live.index += 1

    def _token(self, live: Live, k: int) -> TokenDelta:
        request = live.request
        wire_id, sampling = request.request_id, request.sampling
        delta = TokenDelta(wire_id, first_index=k)
        if not live.has_spoken:
            delta.num_cached_tokens = 16
        if self.eos_at == k:
            delta.finish_reason, delta.stop_token_id = FinishReason.STOP, EOS
        else:
            token_id = self.tokens_of(request, k)
            delta.token_ids = [token_id]
            if sampling.logprobs is not None:
                delta.logprobs = [TokenLogprobs(token_id, -float(k))]
            if token_id in sampling.stop_token_ids:
                delta.token_ids, delta.logprobs = [], []
                delta.finish_reason, delta.stop_token_id = FinishReason.STOP, token_id
            elif k + 1 >= sampling.max_tokens and not self.faults.forgets_the_end:
                delta.finish_reason = FinishReason.LENGTH
        if delta.finish_reason is not None or request.work is Work.PREFILL:
            delta.timeline = self._timeline(request)
            del self.live[wire_id]
            if request.work is Work.PREFILL and delta.finish_reason is None:
                self.kv.held[self.worker_id, wire_id] = True
        return delta

    def _timeline(self, request: GenerateRequest) -> Timeline:
        E = LifecycleEvent
        if request.work is Work.PREFILL:
            return Timeline({E.PREFILL_QUEUED: 1.0, E.PREFILL_STARTED: 1.5, E.PREFILL_ENDED: 2.0})
        points = {E.DECODE_STARTED: 10.0, E.DECODE_ENDED: 11.0}
        is_read = request.work.reads_all_kv
        return Timeline(
            points, TransferStats(4096, 4, 1, 0.25, 0.125) if is_read else TransferStats()
        )

    def _read_kv(self, live: Live) -> bool:
        peer = live.request.kv_source
        assert peer is not None
        wire_id = live.request.request_id
        if (peer.worker_id, peer.epoch) in self.kv.dead:
            del self.live[wire_id]
            self._send(live.session, self._error(wire_id, "peer is gone", True))
            return False
        if self.faults.hold_kv:
            return False
        return self.kv.held.pop((peer.worker_id, wire_id), False)

    def _source_of(self, live: Live) -> Live | None:
        """The request on the worker that `live` takes it over from, while that has it."""
        peer, wire_id = live.request.kv_source, live.request.request_id
        assert peer is not None
        source = self.kv.workers[peer.worker_id]
        if source.is_alive and source.epoch == peer.epoch:
            return source.live.get(wire_id)
        return None

    def _take_over(self, live: Live) -> bool:
        """One step of a takeover; True once the request is here."""
        source, wire_id, phase = self._source_of(live), live.request.request_id, live.phase
        if source is None or phase == self.faults.takeover_fails_in:
            self._let_go(live)
            del self.live[wire_id]
            message = "not running there" if source is None else f"scripted while {phase}"
            self._send(live.session, self._error(wire_id, message, True))
            return False
        known = len(live.request.output_token_ids)
        if source.index > known + TAKEOVER_SLACK_TOKENS:
            del self.live[wire_id]
            self._send(live.session, self._error(wire_id, f"grew to {source.index}", True))
            return False
        if phase == self.faults.takeover_stays_in:
            return False
        if phase != TAKEOVER_PHASES[-1]:
            live.phase = TAKEOVER_PHASES[TAKEOVER_PHASES.index(phase) + 1]
            source.is_frozen = True
            return False
        assert known <= source.index
        live.index = source.index
        assert live.request.kv_source is not None
        self.kv.workers[live.request.kv_source.worker_id].hand_on(wire_id)
        if self.faults.takeover_fails_in == HANDED_ON:
            del self.live[wire_id]
            self._send(live.session, self._error(wire_id, "scripted when handed on", True))
            return False
        return True

    def hand_on(self, wire_id: RequestId) -> None:
        """Another worker has taken the request over: end it here with a last delta."""
        live = self.live.pop(wire_id)
        timeline = self._timeline(live.request)
        # Of the old worker only: the request goes on.
        timeline.points[LifecycleEvent.DECODE_ENDED] = 10.25
        self._send(live.session, TokenDelta(wire_id, first_index=live.index, timeline=timeline))

    def _let_go(self, live: Live) -> None:
        """A takeover by this worker ends: the old worker goes on."""
        if live.request.work is Work.TAKEOVER and not live.has_spoken:
            source = self._source_of(live)
            if source is not None:
                source.is_frozen = False

    def _error(self, wire_id: RequestId, message: str, is_retryable: bool) -> TokenDelta:
        return TokenDelta(
            wire_id,
            finish_reason=FinishReason.ERROR,
            error=message,
            is_retryable=is_retryable,
        )

    def _send(self, queue: asyncio.Queue[pb.WorkerMessage], delta: TokenDelta) -> None:
        batch = pb.StepBatch(deltas=[delta_to_wire(delta)], load=load_to_wire(self.load))
        queue.put_nowait(pb.WorkerMessage(step=batch))


@dataclass
class Outcome:
    """Everything a client saw of one request."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    usage: Usage | None = None
    num_deltas: int = 0

    def add(self, delta: GenerationDelta) -> None:
        assert self.finish_reason is None, "a delta after the last one"
        self.num_deltas += 1
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason
        self.usage = delta.usage


class Cluster:
    """A router core and its fake workers."""

    def __init__(self, core: RouterCore, workers: dict[str, FakeWorker], kv: FakeKv) -> None:
        self.core = core
        self.workers = workers
        self.kv = kv
        self.membership = PushMembership()

    def __getitem__(self, name: str) -> FakeWorker:
        return self.workers[name]

    @property
    def dispatcher(self) -> object:
        return self.core.dispatcher

    async def connected(self, *names: str, timeout_s: float = 8.0) -> None:
        """Wait until exactly these workers take work."""
        wanted = set(names or self.workers)
        async with asyncio.timeout(timeout_s):
            while True:
                view = self.core.pool.view()
                if {w.info.worker_id for w in view.workers if not w.is_quarantined} == wanted:
                    return
                await asyncio.sleep(0.01)

    def input(self, prompt: Sequence[int], max_tokens: int = 8, **kw: object) -> GenerationInput:
        names = {"stop", "cache_salt", "deadline_s", "request_id", "arrived_at_s"}
        own = {k: kw.pop(k) for k in list(kw) if k in names}
        sampling = SamplingParams(max_tokens=max_tokens, **{"temperature": 0.0, **kw})  # type: ignore[arg-type]
        own.setdefault("request_id", RequestId(f"r{random.getrandbits(48):x}"))
        own.setdefault("deadline_s", 20.0)
        return GenerationInput(
            model=MODEL,
            prompt_token_ids=tuple(prompt),
            sampling=sampling,
            **own,  # type: ignore[arg-type]
        )

    async def run(self, request: GenerationInput) -> Outcome:
        outcome = Outcome()
        async for delta in self.stream(request):
            outcome.add(delta)
        return outcome

    async def stream(self, request: GenerationInput) -> AsyncIterator[GenerationDelta]:
        """One delta at a time; closing it closes the generation."""
        generation = self.core.dispatcher.generate(request)
        assert isinstance(generation, AsyncGenerator)
        async with contextlib.aclosing(generation):
            async for deltas in generation:
                for delta in deltas:
                    yield delta

    async def generate(self, prompt: Sequence[int], max_tokens: int = 8, **kw: object) -> Outcome:
        return await self.run(self.input(prompt, max_tokens, **kw))

    async def ended(
        self, prompt: Sequence[int], max_tokens: int, *, cancel_after_s: float | None = None
    ) -> str:
        """How a request ended amid trouble: right, with every token as it must be, cancelled or
        error."""
        task = asyncio.create_task(self.generate(prompt, max_tokens))
        if cancel_after_s is not None:
            await asyncio.sleep(cancel_after_s)
            task.cancel()
        try:
            self.assert_right(await task, prompt, max_tokens)
        except asyncio.CancelledError:
            return "cancelled"
        except BatonError:
            return "error"
        return "right"

    async def rendered(self, *samples: str, timeout_s: float = 3.0) -> str:
        """The metrics, once they hold all of `samples`."""
        async with asyncio.timeout(timeout_s):
            while True:
                text = self.core.metrics.render().decode()
                if all(sample in text for sample in samples):
                    return text
                await asyncio.sleep(0.02)

    async def settled(self, timeout_s: float = 5.0) -> None:
        """Wait until nothing of any request is left, in the router or on a worker."""
        async with asyncio.timeout(timeout_s):
            while (
                self.core.dispatcher.num_in_flight
                or any(s.num_in_flight for s in self.core.pool.sessions())
                or any(w.live for w in self.workers.values() if w.is_alive)
            ):
                await asyncio.sleep(0.01)

    def assert_right(self, outcome: Outcome, prompt: Sequence[int], num_tokens: int) -> None:
        """Exactly the expected tokens, once each, with their text."""
        assert outcome.token_ids == expected_ids(prompt, num_tokens)
        assert outcome.text == expected_text(prompt, num_tokens)
        assert outcome.finish_reason is FinishReason.LENGTH
        assert outcome.usage is not None
        assert outcome.usage.completion_tokens == num_tokens
        assert outcome.usage.prompt_tokens == len(prompt)


def router_config(**dispatch: object) -> RouterConfig:
    """Time-outs short enough for tests."""
    dispatch = {
        "worker_wait_s": 1.0,
        "stall_s": 0.6,
        "request_stall_s": 2.0,
        "watchdog_period_s": 0.05,
        **dispatch,
    }
    return RouterConfig(
        model_path=Path("/nonexistent"),
        model_name=MODEL,
        session=SessionConfig(
            connect_timeout_s=0.5, welcome_timeout_s=0.5, idle_timeout_s=0.6, backoff_min_s=0.05,
            backoff_max_s=0.2, stall_quarantine_s=0.5,
        ),
        dispatch=DispatchConfig(**dispatch),  # type: ignore[arg-type]
        policy=PolicyConfig(local_prefill_max_tokens=64),
        migration=MigrationConfig(
            period_s=0.02, cooldown_s=0.1, cooldown_max_s=0.4, takeover_timeout_s=1.0,
        ),
    )  # fmt: skip


LONG = list(range(1, 101))
"""A prompt above the local-prefill threshold."""
SHORT = [5, 6, 7]
"""A prompt below it."""


@pytest.fixture
def config() -> RouterConfig:
    """What clusters run with."""
    return router_config()


@pytest.fixture
async def make_cluster() -> AsyncIterator[Callable[..., object]]:
    clusters: list[Cluster] = []

    async def make(
        prefill: int = 1, decode: int = 1, *, config: RouterConfig | None = None
    ) -> Cluster:
        kv = FakeKv()
        roles = {f"p{i}": Role.PREFILL for i in range(prefill)}
        roles |= {f"d{i}": Role.DECODE for i in range(decode)}
        workers = {name: FakeWorker(name, role, kv) for name, role in roles.items()}
        for worker in workers.values():
            await worker.start()
        membership = PushMembership({w.worker_id: w.address for w in workers.values()})
        core = RouterCore(
            config or router_config(),
            tokenizers={MODEL: ByteTokenizer()},  # type: ignore[dict-item]
            membership=membership,
            rng=random.Random(1),
        )
        core.start()
        cluster = Cluster(core, workers, kv)
        cluster.membership = membership
        clusters.append(cluster)
        await cluster.connected()
        return cluster

    yield make
    for cluster in clusters:
        await cluster.core.stop()
        for worker in cluster.workers.values():
            await worker.close()


@pytest.fixture
async def cluster(make_cluster: Callable[..., object]) -> Cluster:
    """One prefill and one decode worker."""
    return await make_cluster()  # type: ignore[misc, return-value, operator]
