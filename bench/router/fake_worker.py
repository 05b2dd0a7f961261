"""A worker that computes nothing: a process with the real session protocol and made-up tokens.

    python -m bench.router.fake_worker --role decode --layout-model NAME [--step-ms 5]

Prints one line `ready HOST:PORT` and serves until its standard input closes. Every live sequence
gets one token per step, all of a step in one message, as the engines do; a prompt is "computed" at
once. What it costs is a floor under every router measured with it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import uvloop

from baton.core.kv_layout import KvLayout
from baton.core.lifecycle import LifecycleEvent
from baton.core.worker_info import Epoch, LoadReport, Role, WorkerId, WorkerInfo
from baton.rpc.channel import new_server
from baton.rpc.convert import hashing_to_wire, load_to_wire, worker_info_to_wire
from baton.rpc.v1 import worker_pb2 as pb
from baton.rpc.v1 import worker_pb2_grpc as pb_grpc

BLOCK_SIZE = 16
NUM_BLOCKS = 1 << 20
MAX_MODEL_LEN = 1 << 20
IDLE_REPORT_S = 0.5
TOKEN_ID = 260
"""An ordinary word piece of the tokenizer in use."""


@dataclass(slots=True)
class Sequence:
    """One request of a session, with its next output position."""

    wire_id: str
    next_index: int
    max_tokens: int
    ends_after_first: bool
    """A prefill: the decode worker goes on."""


class FakeSession:
    """The requests of one router."""

    def __init__(self, load: pb.LoadReport, step_s: float) -> None:
        self._load = load
        self._step_s = step_s
        self._live: dict[str, Sequence] = {}
        self._fresh: list[Sequence] = []
        self._has_fresh = asyncio.Event()

    def submit(self, submit: pb.Submit) -> None:
        is_decode = submit.work == pb.WORK_DECODE
        self._fresh.append(
            Sequence(
                submit.request_id,
                len(submit.output_token_ids) + is_decode,
                submit.sampling.max_tokens,
                submit.work == pb.WORK_PREFILL,
            )
        )
        self._has_fresh.set()

    def cancel(self, wire_id: str) -> None:
        self._live.pop(wire_id, None)

    async def steps(self) -> AsyncIterator[pb.WorkerMessage]:
        """Messages: new requests at once, running ones once a step."""
        next_step_s = 0.0
        while True:
            now_s = time.monotonic()
            batch = pb.StepBatch(load=self._load)
            if self._live and now_s >= next_step_s:
                next_step_s = max(now_s, next_step_s + self._step_s)
                for sequence in list(self._live.values()):
                    self._advance(sequence, batch)
            self._start(batch)
            if batch.deltas:
                yield pb.WorkerMessage(step=batch)
            pause_s = max(0.0, next_step_s - time.monotonic()) if self._live else IDLE_REPORT_S
            self._has_fresh.clear()
            if self._fresh:
                continue
            try:
                await asyncio.wait_for(self._has_fresh.wait(), pause_s)
            except TimeoutError:
                if not self._live:
                    yield pb.WorkerMessage(step=pb.StepBatch(load=self._load))

    def _start(self, batch: pb.StepBatch) -> None:
        fresh, self._fresh = self._fresh, []
        for sequence in fresh:
            self._live[sequence.wire_id] = sequence
            if sequence.next_index == 0:
                self._advance(sequence, batch)

    def _advance(self, sequence: Sequence, batch: pb.StepBatch) -> None:
        delta = batch.deltas.add(
            request_id=sequence.wire_id, first_index=sequence.next_index, token_ids=[TOKEN_ID]
        )
        sequence.next_index += 1
        is_done = sequence.next_index >= sequence.max_tokens
        if is_done:
            delta.finish_reason = pb.FINISH_REASON_LENGTH
        if is_done or sequence.ends_after_first:
            now_s = time.time()
            for event in (LifecycleEvent.PREFILL_STARTED, LifecycleEvent.PREFILL_ENDED):
                delta.timeline.points[int(event.value)] = now_s
            del self._live[sequence.wire_id]


class FakeWorker(pb_grpc.WorkerServicer):
    def __init__(self, name: str, role: Role, layout_model: str, step_s: float) -> None:
        self.address = ""
        self._name, self._role, self._model, self._step_s = name, role, layout_model, step_s
        load = LoadReport(free_blocks=NUM_BLOCKS, total_blocks=NUM_BLOCKS)
        self._load = load_to_wire(load)

    async def GetInfo(self, request: pb.GetInfoRequest, context: object) -> pb.Welcome:
        return welcome(self._name, self._role, self.address, self._model, self._load)

    async def Session(
        self, messages: AsyncIterator[pb.RouterMessage], context: grpc.aio.ServicerContext
    ) -> None:
        await anext(messages)
        welcome = await self.GetInfo(pb.GetInfoRequest(), context)
        await context.write(pb.WorkerMessage(welcome=welcome))
        session = FakeSession(self._load, self._step_s)
        reader = asyncio.create_task(self._read(messages, session))
        try:
            async for message in session.steps():
                await context.write(message)
        finally:
            reader.cancel()

    async def _read(self, messages: AsyncIterator[pb.RouterMessage], session: FakeSession) -> None:
        async for message in messages:
            if message.HasField("submit"):
                session.submit(message.submit)
            elif message.HasField("cancel"):
                session.cancel(message.cancel.request_id)


def welcome(name: str, role: Role, address: str, model: str, load: pb.LoadReport) -> pb.Welcome:
    """Of a worker without blocks, which it would name as the router does."""
    layout = KvLayout(model, 1, 1, 8, BLOCK_SIZE, "float32")
    info = WorkerInfo(
        WorkerId(name), Epoch(str(os.getpid())), role, address, model, layout, load.total_blocks,
        MAX_MODEL_LEN, 1 << 16, "fake", os.getpid(),
    )  # fmt: skip
    return pb.Welcome(info=worker_info_to_wire(info), load=load, hashing=hashing_to_wire(layout))


async def _serve(args: argparse.Namespace) -> None:
    server = new_server()
    worker = FakeWorker(
        f"{args.role}-{os.getpid()}", Role(args.role), args.layout_model, args.step_ms / 1000
    )
    pb_grpc.add_WorkerServicer_to_server(worker, server)
    worker.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    print(f"ready {worker.address}", flush=True)
    loop = asyncio.get_running_loop()
    closed = loop.create_future()
    loop.add_reader(sys.stdin, lambda: sys.stdin.read(1) or closed.done() or closed.set_result(0))
    await closed
    await server.stop(grace=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", choices=[role.value for role in Role], required=True)
    parser.add_argument("--layout-model", required=True, help="the model name to announce")
    parser.add_argument("--step-ms", type=float, default=5.0)
    uvloop.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
