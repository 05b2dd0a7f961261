"""Times this worker's links on demand, and says in words what is wrong with them.

The judgement is a pure function of what was measured; the ceiling of a link within one host is
what the host's memory copies at, measured in the same call. Not known here: gRPC, requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from baton.core.errors import InvalidRequest, TransferError, Unavailable
from baton.core.fabric import LinkReport
from baton.core.request import PeerRef
from baton.core.worker_info import WorkerId, WorkerInfo
from kvtransfer.transport import Transport
from services.worker.fabric import Fabric
from services.worker.mesh import Mesh

DEFAULT_ROUNDS = 8
MAX_ROUNDS = 1000
MAX_PEERS = 256
MEASURE_TIMEOUT_S = 20.0
"""Of one peer."""
COPY_BYTES = 64 << 20
"""Above every cache, so that it is the memory that is timed."""
COPY_ROUNDS = 3
SLOW_SHARE = 0.25
"""A link within one host below this share of a memory copy is worth a word. A read that copies
through the kernel or through a second pair of hands has about half of it."""
SLOW_LATENCY_S = 0.005
TCP_LANES = frozenset({"tcp", "tls", "socket"})
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class LinksChecked:
    links: tuple[LinkReport, ...]
    memory_bytes_per_second: float
    findings: tuple[str, ...]


class LinkCheck:
    """One measurement at a time: two would time each other."""

    def __init__(
        self,
        mesh: Mesh,
        transport: Transport,
        fabric: Fabric,
        *,
        myself: WorkerInfo,
        connect_timeout_s: float,
    ) -> None:
        self._myself = myself
        self._mesh = mesh
        self._transport = transport
        self._fabric = fabric
        self._connect_timeout_s = connect_timeout_s
        self._is_running = False

    async def run(self, peers: Sequence[PeerRef], *, num_rounds: int) -> LinksChecked:
        """Time reads from `peers`, or from all known ones. `num_rounds` 0: what is customary.

        Raises InvalidRequest, or Unavailable while another measurement runs.
        """
        if num_rounds > MAX_ROUNDS or len(peers) > MAX_PEERS:
            raise InvalidRequest(
                f"{num_rounds} rounds with {len(peers)} peers, limits {MAX_ROUNDS} and {MAX_PEERS}"
            )
        if self._is_running:
            raise Unavailable("another measurement is running; try again when it has ended")
        self._is_running = True
        try:
            wanted = peers or self._mesh.known_peers()[:MAX_PEERS]
            rate = await asyncio.to_thread(memory_bytes_per_second)
            links = [await self._measure(peer, num_rounds or DEFAULT_ROUNDS) for peer in wanted]
        finally:
            self._is_running = False
        here = _host_of(self._myself.address)
        same_host = {p.worker_id for p in wanted if _host_of(p.address) in (here, *LOOPBACK)}
        return LinksChecked(tuple(links), rate, tuple(findings_of(links, rate, same_host)))

    async def _measure(self, peer: PeerRef, num_rounds: int) -> LinkReport:
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await self._mesh.link_to(peer).ready()
            report = await self._transport.measure(
                peer.worker_id, num_rounds=num_rounds, timeout_s=MEASURE_TIMEOUT_S
            )
        except (TransferError, TimeoutError) as error:
            reason = str(error) or f"no link within {self._connect_timeout_s:g} s"
            return LinkReport(peer.worker_id, peer.epoch, "", reason=reason)
        self._fabric.linked(report)
        return report


def findings_of(
    links: Sequence[LinkReport], memory_bytes_per_second: float, same_host: Collection[WorkerId]
) -> list[str]:
    """What a person should look into, one line each; empty when all is well.

    `same_host`: peers whose addresses are those of this worker's host.
    """
    findings: list[str] = []
    for link in links:
        if not link.transport:
            findings.append(f"{link.peer_id} cannot be read: {link.reason or 'no link'}")
            continue
        name = f"{link.peer_id} is read by {link.transport} ({link.lane or 'lane unknown'})"
        is_near = link.peer_id in same_host
        if is_near and not TCP_LANES.isdisjoint((link.transport, link.lane)):
            findings.append(f"{name} although both run on one host: {link.reason or 'no reason'}")
        elif link.reason:
            findings.append(f"{name}, a faster way was not taken: {link.reason}")
        if is_near and link.bytes_per_second < SLOW_SHARE * memory_bytes_per_second:
            findings.append(
                f"{name} at {link.bytes_per_second / 1e9:.2f} GB/s, a memory copy here makes "
                f"{memory_bytes_per_second / 1e9:.2f} GB/s: is the host busy, or are the two on "
                "different NUMA nodes?"
            )
        if link.latency_s > SLOW_LATENCY_S:
            findings.append(
                f"{name}: one block takes {link.latency_s * 1e3:.1f} ms, "
                f"limit {SLOW_LATENCY_S * 1e3:.0f} ms"
            )
    if not links:
        findings.append("this worker knows no peer: no router has named any, none was connected")
    return findings


def memory_bytes_per_second() -> float:
    """The best of a few copies of `COPY_BYTES` within this process."""
    source, target = bytearray(COPY_BYTES), bytearray(COPY_BYTES)
    best_s = float("inf")
    for _ in range(COPY_ROUNDS):
        started_s = time.perf_counter()
        target[:] = source
        best_s = min(best_s, time.perf_counter() - started_s)
    return COPY_BYTES / best_s


def _host_of(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")
