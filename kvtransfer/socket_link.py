"""Reading blocks over TCP, for peers that share no memory with us: framed, copied by the receiver.

A worker serves its pool (`socket_server`) and reads those of others (`socket_connection`). Nothing
lands late: a read that was given up on is over at once, so nothing is ever quarantined here. A
connection that is lost fails its reads, and the next read of that peer opens another one.

Between hosts it is the one transport, since a NIXL read over TCP is emulated and can kill the
process it reads from.
"""

from __future__ import annotations

import ctypes
import socket
import time
from dataclasses import dataclass

from baton.core.errors import IncompatiblePeer, PeerGone, TransferError
from baton.core.tls import TlsFiles
from baton.core.worker_info import WorkerId
from kvtransfer.link import ConnectionLost, OpenedPeer, Posted
from kvtransfer.metadata import PeerCard, PeerIdentity, SocketEndpoint
from kvtransfer.plan import BlockIds, PairPlan
from kvtransfer.socket_connection import Exchange, Route, SocketConnection
from kvtransfer.socket_server import ServerLimits, SocketServer
from kvtransfer.transport import PoolRegion

OPEN_TIMEOUT_S = 2.5
"""For an owner to accept a connection and to prove itself."""


@dataclass(frozen=True, slots=True)
class SocketConfig:
    """Where a worker serves its blocks."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 0
    """0 takes any free port."""
    advertise_host: str | None = None
    """Name or address under which peers reach it; None takes `host`."""
    tls: TlsFiles | None = None
    """Both ends show a certificate of the deployment."""


@dataclass(slots=True, eq=False)
class _Peer:
    route: Route
    exchange: Exchange
    connection: SocketConnection

    def close(self) -> None:
        self.connection.close()


class SocketLink:
    """Implements `PeerLink` for pools in host memory."""

    name = SocketEndpoint.transport
    reads_layers = False

    def __init__(
        self,
        region: PoolRegion,
        identity: PeerIdentity,
        secret: bytes,
        *,
        config: SocketConfig | None = None,
        limits: ServerLimits | None = None,
    ) -> None:
        self._region = region
        self._identity = identity
        self._secret = secret
        self._config = config or SocketConfig()
        self._limits = limits
        self._server: SocketServer | None = None
        self._endpoint: SocketEndpoint | None = None
        self._peers: dict[WorkerId, _Peer] = {}

    @property
    def lane(self) -> str:
        return "tcp" if self._config.tls is None else "tls"

    @property
    def endpoint(self) -> SocketEndpoint | None:
        return self._endpoint

    def open(self) -> None:
        """Listen. Raises TransferError when that cannot be done."""
        if self._region.device_id is not None:
            raise TransferError(
                "KV in GPU memory is not read over sockets; keep both workers on one host"
            )
        config = self._config
        memory = (ctypes.c_char * self._region.num_bytes).from_address(self._region.address)
        self._memory = memoryview(memory).cast("B")
        self._server = SocketServer(
            self._region,
            self._identity,
            self._secret,
            tls=config.tls,
            limits=self._limits,
        )
        port = self._server.start(config.host, config.port)
        self._endpoint = SocketEndpoint(
            config.advertise_host or config.host, port, config.tls is not None
        )

    def open_peer(
        self, card: PeerCard, plan: PairPlan, layer_plan: PairPlan | None = None
    ) -> _Peer:
        endpoint = card.endpoint(SocketEndpoint)
        if endpoint is None:
            raise IncompatiblePeer(f"{card.worker_id} does not offer it")
        tls = self._config.tls
        if endpoint.uses_tls != (tls is not None):
            here, there = ("with", "without") if tls else ("without", "with")
            raise IncompatiblePeer(
                f"{here} TLS here, {there} it at {card.worker_id}; set the same for all workers"
            )
        exchange = Exchange(self._identity, card.identity, self._secret, plan, self._memory)
        route = resolve(endpoint.host, endpoint.port, tls=tls)
        return _Peer(route, exchange, open_connection(route, exchange, timeout_s=OPEN_TIMEOUT_S))

    def add_peer(self, peer: WorkerId, opened: OpenedPeer) -> None:
        assert isinstance(opened, _Peer)
        self._peers[peer] = opened

    def is_peer_dead(self, peer: WorkerId) -> bool:
        """A process on another host cannot be watched: its lost connections say so."""
        return peer not in self._peers

    def drop_peer(self, peer: WorkerId) -> None:
        known = self._peers.pop(peer, None)
        if known is not None:
            known.close()

    def post(
        self, peer: WorkerId, remote: BlockIds, local: BlockIds, *, by_layer: bool = False
    ) -> Posted | None:
        assert not by_layer
        known = self._peers.get(peer)
        if known is None:
            raise PeerGone(f"{peer} is not connected")
        if known.connection.is_idle and not _is_alive(known.connection):
            known.connection.close()
            known.connection = SocketConnection(known.route, known.exchange)
        return known.connection.read(remote, local)

    def needs_recycle(self, peer: WorkerId) -> bool:
        return False

    def recycle(self) -> None:
        """Nothing given up on can land."""

    def close(self) -> None:
        for peer in list(self._peers):
            self.drop_peer(peer)
        if self._server is not None:
            self._server.close()


def _is_alive(connection: SocketConnection) -> bool:
    """Asked while nobody waits: an end that came meanwhile is nobody's failure."""
    try:
        connection.pump()
    except PeerGone:
        return False
    return True


def resolve(host: str, port: int, *, tls: TlsFiles | None) -> Route:
    """May wait for a name server. Raises PeerGone."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise PeerGone(f"host {host} cannot be resolved ({error.strerror})") from None
    return Route(family, (str(address[0]), int(address[1])), host, tls)


def open_connection(route: Route, exchange: Exchange, *, timeout_s: float) -> SocketConnection:
    """A ready connection; waits for the handshake. Raises PeerGone."""
    deadline_s = time.monotonic() + timeout_s
    connection = SocketConnection(route, exchange)
    try:
        connection.pump()
        while not connection.is_ready:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise ConnectionLost(
                    f"{exchange.owner.worker_id} does not answer at {route.host} within "
                    f"{timeout_s:g} s"
                )
            connection.wait(left_s)
            connection.pump()
    except TransferError:
        connection.close()
        raise
    return connection
