"""Two pools of workers that compute nothing, but take the time that computing would take.

    python -m bench.router.modelled_worker --model NAME --prefill 2 --decode 2

Prompts of a worker are computed in chunks, one after the other, `--token-us` a token; a decode step
takes `--itl-ms` and `--sequence-us` for each sequence of its batch. Load reports and time lines say
so, as those of engines do, so that routers can learn the speeds and queue accordingly. With
`--cache-blocks` a worker keeps so many blocks of the prompts it has computed, read from a peer that
the router has named or been handed over, does not compute them again, and tells the routers.

All workers are one process. It prints `ready HOST:PORT,...` and serves until its standard input
closes.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc
import uvloop

from baton.core.lifecycle import LifecycleEvent as Event
from baton.core.worker_info import LoadReport, Role
from baton.rpc.channel import new_server
from baton.rpc.convert import load_to_wire
from baton.rpc.v1 import worker_pb2 as pb
from baton.rpc.v1 import worker_pb2_grpc as pb_grpc
from bench.router.block_cache import BlockCache
from bench.router.fake_worker import BLOCK_SIZE, IDLE_REPORT_S, welcome

NUM_BLOCKS = 1 << 18
CHUNK_TOKENS = 512
HANDOFF_POLL_S = 0.002
TOKEN_ID = 97


@dataclass(frozen=True, slots=True)
class Speeds:
    token_s: float
    itl_s: float
    sequence_s: float


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on one worker."""

    wire_id: str
    queue: asyncio.Queue[pb.WorkerMessage]
    work: int
    num_prompt_tokens: int
    max_tokens: int
    next_index: int
    tokens_left: int
    """Of the prompt, to be computed here."""
    block_hashes: bytes = b""
    num_cached: int = 0
    """Tokens of the prompt that were there."""
    points: dict[int, float] = field(default_factory=dict)

    def stamp(self, event: Event) -> None:
        self.points.setdefault(int(event.value), time.time())


class ModelledWorker(pb_grpc.WorkerServicer):
    """One worker; `computed` names prompts whose KV the prefill workers hold."""

    def __init__(
        self,
        name: str,
        role: Role,
        model: str,
        speeds: Speeds,
        computed: set[str],
        *,
        caches: dict[str, BlockCache],
    ) -> None:
        """`caches`: of all workers by name, as far as they have any."""
        self.address = ""
        self._name, self._role, self._model, self._speeds = name, role, model, speeds
        self._computed = computed
        self._prompts: deque[Sequence] = deque()
        self._expected: dict[str, Sequence] = {}
        self._batch: dict[str, Sequence] = {}
        self._sessions: set[asyncio.Queue[pb.WorkerMessage]] = set()
        self._has_work = asyncio.Event()
        self._caches, self._cache = caches, caches.get(name) or BlockCache(0)

    def load(self) -> pb.LoadReport:
        live = [*self._batch.values(), *self._expected.values(), *self._prompts]
        resident = sum(s.num_prompt_tokens + s.next_index for s in self._batch.values())
        held = sum(-(-(s.num_prompt_tokens + s.next_index) // BLOCK_SIZE) for s in live)
        return load_to_wire(
            LoadReport(
                num_running=len(self._batch) + bool(self._prompts),
                num_waiting=max(0, len(self._prompts) - 1),
                queued_prefill_tokens=sum(s.tokens_left for s in self._prompts),
                resident_kv_tokens=resident,
                free_blocks=NUM_BLOCKS - held,
                total_blocks=NUM_BLOCKS,
                reservations=len(self._expected),
            )
        )

    async def run(self) -> None:
        """Engine steps, for ever."""
        while True:
            self._join_computed()
            if not self._prompts and not self._batch:
                if self._expected:
                    await asyncio.sleep(HANDOFF_POLL_S)
                    continue
                self._has_work.clear()
                try:
                    await asyncio.wait_for(self._has_work.wait(), IDLE_REPORT_S)
                except TimeoutError:
                    self._send({})
                continue
            await asyncio.sleep(self._step_s())
            messages: dict[asyncio.Queue[pb.WorkerMessage], pb.StepBatch] = {}
            self._compute(messages)
            self._decode(messages)
            self._send(messages)

    def _step_s(self) -> float:
        speeds, seconds = self._speeds, 0.0
        if self._prompts:
            seconds += min(CHUNK_TOKENS, self._prompts[0].tokens_left) * speeds.token_s
            self._prompts[0].stamp(Event.PREFILL_STARTED)
        if self._batch:
            seconds += speeds.itl_s + speeds.sequence_s * len(self._batch)
        return seconds

    def _compute(self, messages: dict[asyncio.Queue[pb.WorkerMessage], pb.StepBatch]) -> None:
        if not self._prompts:
            return
        sequence = self._prompts[0]
        sequence.tokens_left -= min(CHUNK_TOKENS, sequence.tokens_left)
        if sequence.tokens_left:
            return
        self._prompts.popleft()
        self._cache.store(sequence.block_hashes)
        sequence.stamp(Event.PREFILL_STARTED)
        sequence.stamp(Event.PREFILL_ENDED)
        if sequence.work == pb.WORK_PREFILL:
            self._computed.add(sequence.wire_id)
            self._token(sequence, messages, is_last=True)
        else:
            self._batch[sequence.wire_id] = sequence
            sequence.stamp(Event.DECODE_STARTED)
            self._token(sequence, messages)

    def _decode(self, messages: dict[asyncio.Queue[pb.WorkerMessage], pb.StepBatch]) -> None:
        for sequence in list(self._batch.values()):
            self._token(sequence, messages)

    def _token(
        self,
        sequence: Sequence,
        messages: dict[asyncio.Queue[pb.WorkerMessage], pb.StepBatch],
        *,
        is_last: bool = False,
    ) -> None:
        if sequence.wire_id not in self._batch and not is_last:
            return
        batch = messages.setdefault(sequence.queue, pb.StepBatch())
        delta = batch.deltas.add(
            request_id=sequence.wire_id, first_index=sequence.next_index, token_ids=[TOKEN_ID]
        )
        delta.num_cached_tokens = sequence.num_cached
        sequence.next_index += 1
        if sequence.next_index >= sequence.max_tokens:
            delta.finish_reason = pb.FINISH_REASON_LENGTH
            is_last = True
        if is_last:
            sequence.stamp(Event.DECODE_ENDED)
            delta.timeline.points.update(sequence.points)
            self._batch.pop(sequence.wire_id, None)

    def _join_computed(self) -> None:
        for wire_id in [w for w in self._expected if w in self._computed]:
            self._computed.discard(wire_id)
            sequence = self._batch[wire_id] = self._expected.pop(wire_id)
            self._cache.store(sequence.block_hashes)
            sequence.stamp(Event.DECODE_STARTED)

    def _send(self, messages: dict[asyncio.Queue[pb.WorkerMessage], pb.StepBatch]) -> None:
        load = self.load()
        first, events = self._cache.take_events()
        for queue in self._sessions:
            batch = messages.get(queue, pb.StepBatch())
            batch.load.CopyFrom(load)
            if events:
                batch.first_kv_sequence = first
                batch.kv_events.extend(events)
            queue.put_nowait(pb.WorkerMessage(step=batch))

    # gRPC

    async def GetInfo(self, request: pb.GetInfoRequest, context: object) -> pb.Welcome:
        return welcome(self._name, self._role, self.address, self._model, self.load())

    async def Session(
        self, messages: AsyncIterator[pb.RouterMessage], context: grpc.aio.ServicerContext
    ) -> None:
        await anext(messages)
        await context.write(
            pb.WorkerMessage(welcome=await self.GetInfo(pb.GetInfoRequest(), context))
        )
        queue: asyncio.Queue[pb.WorkerMessage] = asyncio.Queue()
        self._sessions.add(queue)
        reader = asyncio.create_task(self._read(messages, queue))
        try:
            while True:
                await context.write(await queue.get())
        finally:
            self._sessions.discard(queue)
            reader.cancel()

    async def _read(
        self,
        messages: AsyncIterator[pb.RouterMessage],
        queue: asyncio.Queue[pb.WorkerMessage],
    ) -> None:
        async for message in messages:
            if message.HasField("submit"):
                self._submit(message.submit, queue)
            elif message.HasField("cancel"):
                self._cancel(message.cancel.request_id)

    def _submit(self, submit: pb.Submit, queue: asyncio.Queue[pb.WorkerMessage]) -> None:
        num_prompt = len(submit.prompt_token_ids) + len(submit.output_token_ids)
        is_decode = submit.work == pb.WORK_DECODE
        num_cached = 0 if is_decode else self._num_cached(submit, num_prompt)
        sequence = Sequence(
            submit.request_id, queue, submit.work, num_prompt, submit.sampling.max_tokens,
            len(submit.output_token_ids) + is_decode, 0 if is_decode else num_prompt - num_cached,
            submit.block_hashes, num_cached,
        )  # fmt: skip
        if is_decode:
            self._expected[sequence.wire_id] = sequence
        else:
            sequence.stamp(Event.PREFILL_QUEUED)
            self._prompts.append(sequence)
        self._has_work.set()

    def _num_cached(self, submit: pb.Submit, num_prompt: int) -> int:
        """Here, or at the peer to read it from, which takes no time."""
        peer = self._caches.get(submit.kv_source.worker_id, self._cache)
        caches = (self._cache, peer)
        return max(cache.match(submit.block_hashes, num_prompt) for cache in caches)

    def _cancel(self, wire_id: str) -> None:
        self._computed.discard(wire_id)
        self._batch.pop(wire_id, None)
        self._expected.pop(wire_id, None)
        self._prompts = deque(s for s in self._prompts if s.wire_id != wire_id)


async def _serve(args: argparse.Namespace) -> None:
    speeds = Speeds(args.token_us / 1e6, args.itl_ms / 1e3, args.sequence_us / 1e6)
    computed: set[str] = set()
    caches: dict[str, BlockCache] = {}
    roles = [Role.PREFILL] * args.prefill + [Role.DECODE] * args.decode
    workers, servers = [], []
    for number, role in enumerate(roles):
        name = f"{role.value}-{number}"
        caches[name] = BlockCache(args.cache_blocks)
        worker = ModelledWorker(name, role, args.model, speeds, computed, caches=caches)
        server = new_server()
        pb_grpc.add_WorkerServicer_to_server(worker, server)
        worker.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        workers.append(worker)
        servers.append(server)
    engines = [asyncio.create_task(worker.run()) for worker in workers]
    print(f"ready {','.join(worker.address for worker in workers)}", flush=True)
    loop = asyncio.get_running_loop()
    closed = asyncio.Event()

    def read() -> None:
        if not sys.stdin.read(1):
            closed.set()

    loop.add_reader(sys.stdin, read)
    watch = asyncio.create_task(closed.wait())
    await asyncio.wait([watch, *engines], return_when=asyncio.FIRST_COMPLETED)
    for task in (watch, *engines):
        task.cancel()
    for server in servers:
        await server.stop(grace=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="the model name to announce")
    parser.add_argument("--prefill", type=int, default=2)
    parser.add_argument("--decode", type=int, default=2)
    parser.add_argument("--token-us", type=float, default=100.0)
    parser.add_argument("--itl-ms", type=float, default=10.0)
    parser.add_argument("--sequence-us", type=float, default=500.0)
    parser.add_argument("--cache-blocks", type=int, default=0, help="of each worker; 0: none")
    uvloop.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
