"""Asks workers who they are and has them time their links. Every call has a deadline.

 1. GetInfo of all workers at once; then, from those that answered, the fabric report that a router
    would get, over a session that asks for nothing.
 2. Measure, one pair after the other: two at once would time each other. A worker times links for
    whoever shows a card of the deployment, so each call shows one of a tool that is registered
    nowhere: it opens no lease stream and no worker connects to it.
 3. GetInfo again, as long as a worker that has nothing to do still holds something.

What goes wrong becomes part of what is seen. Not known here: what is good or bad.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import grpc

from baton.cli.doctor_places import Place, Places
from baton.cli.doctor_types import LinkSeen, WorkerSeen
from baton.core.errors import BatonError
from baton.core.fabric import FabricReport
from baton.core.request import PeerRef
from baton.core.tls import TlsFiles
from baton.core.worker_info import PROTOCOL_VERSION, Epoch, LoadReport, WorkerId, WorkerInfo
from baton.rpc.channel import open_channel, unreachable_reason
from baton.rpc.convert import (
    fabric_from_wire,
    link_from_wire,
    load_from_wire,
    peer_to_wire,
    worker_info_from_wire,
)
from baton.rpc.v1 import transfer_pb2 as transfer
from baton.rpc.v1 import transfer_pb2_grpc, worker_pb2_grpc
from baton.rpc.v1 import worker_pb2 as worker
from kvtransfer.metadata import PeerCard, seal_card
from kvtransfer.peer_process import host_id, pid_namespace
from services.router.workers.kv_feed import hashing_difference
from services.router.workers.peers import peers_of
from services.worker.link_check import LOOPBACK

CARD_LIFETIME_S = 60.0
CLOSE_TIMEOUT_S = 1.0
MAX_AT_ONCE = 32
EXPLAIN_MARGIN_S = 1.5
"""For saying why a worker is unreachable, after the call's own deadline."""
BUSY_PAUSE_S = 0.3
BUSY = "another measurement"
NUM_LOOKS, LOOK_PAUSE_S = 3, 0.5

T = TypeVar("T")
Progress = Callable[[str], None]


class _Failed(Exception):
    """A call failed; the text says why."""

    def __init__(self, reason: str, *, is_refused: bool = False) -> None:
        super().__init__(reason)
        self.is_refused = is_refused


@dataclass(frozen=True, slots=True)
class Asker:
    """`timeout_s` is the deadline of each call."""

    secret: bytes = field(repr=False)
    tls: TlsFiles | None
    timeout_s: float
    progress: Progress

    async def workers(self, places: Sequence[Place]) -> list[WorkerSeen]:
        """All at once; silence takes one time-out."""
        self.progress(f"asking {len(places)} workers")
        limit = asyncio.Semaphore(MAX_AT_ONCE)

        async def ask(place: Place) -> WorkerSeen:
            async with limit:
                return await self._worker(place)

        return list(await asyncio.gather(*(ask(place) for place in places)))

    async def links(self, seen: Sequence[WorkerSeen], *, num_rounds: int) -> list[LinkSeen]:
        """Every pair of which a router would name one to the other."""
        infos = {each.info: each for each in seen if each.info is not None}
        pairs = [(reader, peer) for reader, peers in peers_of(infos).items() for peer in peers]
        links = []
        for number, (reader, peer) in enumerate(pairs, start=1):
            name = f"{reader.worker_id} <- {peer.worker_id}"
            self.progress(f"timing link {number} of {len(pairs)}: {name}")
            links.append(await self._link(infos[reader], reader, peer, num_rounds))
        return links

    async def settled(self, seen: Sequence[WorkerSeen]) -> list[WorkerSeen]:
        """With each worker's last load: what is held between two requests is gone by then."""
        self.progress("looking for what idle workers hold")
        return list(await asyncio.gather(*(self._settle(each) for each in seen)))

    async def _settle(self, seen: WorkerSeen) -> WorkerSeen:
        if seen.info is None:
            return seen
        for look in range(NUM_LOOKS):
            try:
                _, load, _ = await self._info(seen.address)
            except _Failed as error:
                reason = f"it answered at first and then no more: {error}"
                return replace(seen, load=None, failure=reason)
            seen = replace(seen, load=load)
            if not _holds_something(load) or look + 1 == NUM_LOOKS:
                break
            await asyncio.sleep(LOOK_PAUSE_S)
        return seen

    async def _worker(self, place: Place) -> WorkerSeen:
        entry = place.entry
        seen = WorkerSeen(place.address, entry)
        if entry is not None and not entry.has_process:
            return replace(seen, failure="its process has ended")
        try:
            info, load, hashing = await self._info(place.address)
        except _Failed as error:
            state = "" if entry is None else process_state(entry.info.pid)
            return replace(seen, failure=str(error), process_state=state)
        seen = replace(seen, info=info, load=load, hashing_problem=hashing)
        try:
            return replace(seen, fabric=await self._call(place.address, self._fabric))
        except _Failed as error:
            return replace(seen, failure=f"it gives no fabric report: {error}")

    async def _info(self, address: str) -> tuple[WorkerInfo, LoadReport, str]:
        """Also how its names of blocks differ from ours, if they do."""

        async def ask(channel: grpc.aio.Channel) -> tuple[WorkerInfo, LoadReport, str]:
            stub = worker_pb2_grpc.WorkerStub(channel)
            answer = await stub.GetInfo(worker.GetInfoRequest(), timeout=self.timeout_s)
            try:
                info = worker_info_from_wire(answer.info)
                problem = hashing_difference(answer.hashing, info.layout)
                return info, load_from_wire(answer.load), problem
            except (BatonError, ValueError) as error:
                raise _Failed(f"its answer is not of this version: {error}") from None

        return await self._call(address, ask)

    async def _fabric(self, channel: grpc.aio.Channel) -> FabricReport:
        call = worker_pb2_grpc.WorkerStub(channel).Session(timeout=self.timeout_s)
        try:
            hello = worker.Hello(router_id=_tool_name(), protocol_version=PROTOCOL_VERSION)
            await call.write(worker.RouterMessage(hello=hello))
            async for message in call:
                if message.WhichOneof("body") == "fabric":
                    return fabric_from_wire(message.fabric)
            raise _Failed("the session ended before one came")
        finally:
            call.cancel()

    async def _link(
        self, seen: WorkerSeen, reader: WorkerInfo, peer: PeerRef, num_rounds: int
    ) -> LinkSeen:
        link = LinkSeen(reader.worker_id, peer.worker_id, on_one_host(seen.address, peer.address))

        async def ask(channel: grpc.aio.Channel) -> transfer.MeasureReply:
            return await self._measure(channel, reader, peer, num_rounds)

        try:
            reply = await self._call(seen.address, ask)
        except _Failed as error:
            return replace(link, failure=str(error), is_refused=error.is_refused)
        reports = [link_from_wire(each) for each in reply.links]
        if len(reports) != 1:
            return replace(link, failure=f"the answer holds {len(reports)} links instead of one")
        return replace(
            link, report=reports[0], memory_bytes_per_second=reply.memory_bytes_per_second
        )

    async def _measure(
        self, channel: grpc.aio.Channel, reader: WorkerInfo, peer: PeerRef, num_rounds: int
    ) -> transfer.MeasureReply:
        """Waits its turn, within the deadline, while another tool has this worker measure."""
        stub = transfer_pb2_grpc.TransferStub(channel)
        ends_at_s = time.monotonic() + self.timeout_s
        while True:
            left_s = max(0.05, ends_at_s - time.monotonic())
            # A name of its own for each call: a worker bounds how many nonces one name may use up.
            name, epoch = WorkerId(_tool_name()), Epoch(secrets.token_hex(8))
            who = transfer.ChallengeRequest(worker_id=name, epoch=epoch)
            nonce = (await stub.Challenge(who, timeout=left_s)).nonce
            request = transfer.MeasureRequest(
                peers=[peer_to_wire(peer)],
                num_rounds=num_rounds,
                card=seal_card(_tool_card(name, epoch, reader, nonce), self.secret),
                challenge=nonce,
            )
            try:
                reply: transfer.MeasureReply = await stub.Measure(request, timeout=left_s)
                return reply
            except grpc.aio.AioRpcError as error:
                is_busy = BUSY in (error.details() or "")
                if not is_busy or ends_at_s - time.monotonic() < BUSY_PAUSE_S:
                    raise
            await asyncio.sleep(BUSY_PAUSE_S)

    async def _call(self, address: str, ask: Callable[[grpc.aio.Channel], Awaitable[T]]) -> T:
        """Raises _Failed, at the latest a little after the deadline of a call."""
        channel = open_channel(address, self.tls)
        try:
            async with asyncio.timeout(2 * self.timeout_s + EXPLAIN_MARGIN_S):
                try:
                    return await ask(channel)
                except grpc.aio.AioRpcError as error:
                    raise await self._failure(error, address) from None
        except TimeoutError:
            raise _Failed(f"no answer within {self.timeout_s:g} s") from None
        finally:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(channel.close(), CLOSE_TIMEOUT_S)

    async def _failure(self, error: grpc.aio.AioRpcError, address: str) -> _Failed:
        match error.code():
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return _Failed(f"no answer within {self.timeout_s:g} s")
            case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.FAILED_PRECONDITION:
                return _Failed(f"it refused: {error.details()}", is_refused=True)
            case grpc.StatusCode.UNIMPLEMENTED:
                return _Failed("it is no Baton worker, or of an older release")
            case _:
                return _Failed(await unreachable_reason(error, address, self.tls))


def asker(places: Places, *, timeout_s: float, progress: Progress) -> Asker:
    return Asker(places.secret, places.tls, timeout_s, progress)


def on_one_host(one: str, other: str) -> bool:
    """Whether two addresses are of one host, as far as addresses tell."""
    hosts = [address.rpartition(":")[0].strip("[]") for address in (one, other)]
    return hosts[0] == hosts[1] or all(host in LOOPBACK for host in hosts)


def process_state(pid: int) -> str:
    """What the kernel says a process of this machine does; empty when it just runs."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            state = file.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
    return {
        "T": "stopped by a signal",
        "t": "stopped by a debugger",
        "D": "waiting for a device or the network",
        "Z": "dead and not collected by its parent",
    }.get(state, "")


def _holds_something(load: LoadReport) -> bool:
    if load.num_running or load.num_waiting:
        return False
    used = load.total_blocks - load.free_blocks - load.cached_blocks
    return bool(load.leases or load.reservations or used)


def _tool_name() -> str:
    return f"doctor-{secrets.token_hex(4)}"


def _tool_card(name: WorkerId, epoch: Epoch, reader: WorkerInfo, nonce: bytes) -> PeerCard:
    """A card that says no more than that its bearer holds the secret."""
    now_s = time.time()
    return PeerCard(
        worker_id=name,
        epoch=epoch,
        layout=reader.layout,
        num_blocks=1,
        num_scratch_blocks=0,
        tp_rank=0,
        tp_size=1,
        host_id=host_id(),
        pid_namespace=pid_namespace(),
        pid=os.getpid(),
        endpoints=(),
        nonce=nonce,
        issued_at_s=now_s,
        expires_at_s=now_s + CARD_LIFETIME_S,
    )
