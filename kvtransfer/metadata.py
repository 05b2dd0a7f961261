"""Peer cards: what a worker tells others so that they may read its KV pool.

    wire = HMAC-SHA256(secret, context + JSON) (32 bytes) + JSON

A card is a capability to the memory of a process: it travels over the control plane only and is
never logged. It is made for one connection: the nonce in it is the asking peer's. Checks come in
this order, each before anything behind it is looked at: size, signature, protocol version, nonce,
expiry, shape, layout. What a link needs of it (such as an agent blob) is opened last, by the link:
a truncated blob makes NIXL forget a good peer.

Version 1: one endpoint, equal block sizes.
Version 2: every way the worker can be read, the nonce, the rank of the pool.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

from baton.core.errors import BadPeerCard, BatonError, IncompatiblePeer
from baton.core.kv_layout import KvLayout
from baton.core.worker_info import PROTOCOL_VERSION, Epoch, WorkerId
from kvtransfer.plan import RankPool, layout_obstacle

MAX_CARD_BYTES = 64 << 10
CARD_LIFETIME_S = 3600.0
"""A card is made anew for every connection; long, because the clocks of two hosts may differ."""
CANARY_BYTES = 32
MIN_NONCE_BYTES = 16
MAX_NONCE_BYTES = 64
_SIGNATURE_BYTES = hashlib.sha256().digest_size
_CONTEXT = b"baton peer card\x00"


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """Who a card speaks for."""

    worker_id: WorkerId
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class NixlEndpoint:
    """How a NIXL agent reaches the pool."""

    transport: ClassVar[str] = "nixl"
    agent_name: str
    agent_blob: bytes
    pool_address: int
    device_id: int
    """CUDA ordinal; 0 for host memory."""
    memory_type: str
    """DRAM or VRAM, of the pool."""
    canary_address: int
    """In host memory."""
    canary: bytes
    """Random bytes; reading them proves that we reach the process that made the card."""


@dataclass(frozen=True, slots=True)
class ShmEndpoint:
    """Where the file with the pool can be opened by processes of the same user."""

    transport: ClassVar[str] = "shm"
    path: str
    file_bytes: int
    pool_offset: int
    canary_offset: int
    canary: bytes


@dataclass(frozen=True, slots=True)
class SocketEndpoint:
    """Where the worker serves its blocks over TCP. The handshake proves who answers there."""

    transport: ClassVar[str] = "socket"
    host: str
    port: int
    uses_tls: bool


@dataclass(frozen=True, slots=True)
class MappedEndpoint:
    """Device memory that processes of the same host may map and read with a kernel of theirs."""

    transport: ClassVar[str] = "mapped"
    handle: bytes
    """Of the allocation that holds the pool."""
    device_uuid: str
    pool_offset: int
    """In the allocation."""
    num_bytes: int
    """Of the pool."""


Endpoint = NixlEndpoint | ShmEndpoint | SocketEndpoint | MappedEndpoint
_ENDPOINTS: dict[str, type[Endpoint]] = {
    kind.transport: kind for kind in (NixlEndpoint, ShmEndpoint, SocketEndpoint, MappedEndpoint)
}
E = TypeVar("E", bound=Endpoint)


@dataclass(frozen=True, slots=True)
class PeerCard:
    """One process lifetime of one worker."""

    worker_id: WorkerId
    epoch: Epoch
    layout: KvLayout
    """Of the whole model."""
    num_blocks: int
    """All of the pool, with its scratch blocks at the end."""
    num_scratch_blocks: int
    tp_rank: int
    """Of the pool behind this card; 0 of 1 when it holds all heads."""
    tp_size: int
    host_id: str
    pid_namespace: str
    pid: int
    endpoints: tuple[Endpoint, ...]
    """Every way to read the pool, the owner's preferred one first."""
    nonce: bytes
    """Of the peer that asked for this card."""
    issued_at_s: float
    """Unix time."""
    expires_at_s: float
    protocol_version: int = PROTOCOL_VERSION

    @property
    def identity(self) -> PeerIdentity:
        return PeerIdentity(self.worker_id, self.epoch)

    @property
    def name(self) -> WorkerId:
        """Tells pools apart: the worker's id, with the rank where each rank has a pool."""
        if self.tp_size == 1:
            return self.worker_id
        return WorkerId(f"{self.worker_id}#{self.tp_rank}")

    @property
    def pool(self) -> RankPool:
        """Raises IncompatiblePeer when there can be no such rank."""
        return RankPool(self.layout, self.tp_rank, self.tp_size, self.num_blocks)

    def endpoint(self, kind: type[E]) -> E | None:
        """The endpoint of that kind, if the worker offers it."""
        for endpoint in self.endpoints:
            if isinstance(endpoint, kind):
                return endpoint
        return None


def seal_card(card: PeerCard, secret: bytes) -> bytes:
    """The signed wire form. Raises BadPeerCard when a peer would not accept it."""
    _check_nonce(card.nonce)
    payload = json.dumps(_plain(card), sort_keys=True).encode()
    wire = _sign(payload, secret) + payload
    if len(wire) > MAX_CARD_BYTES:
        raise BadPeerCard(f"own card has {len(wire)} bytes, limit {MAX_CARD_BYTES}")
    return wire


def open_card(wire: bytes, secret: bytes, *, now_s: float, nonce: bytes) -> PeerCard:
    """Verify a card that was made for `nonce` and read it. `now_s` is Unix time.

    Raises BadPeerCard (size, signature, nonce, expiry, shape) or IncompatiblePeer (protocol
    version).
    """
    if not _SIGNATURE_BYTES < len(wire) <= MAX_CARD_BYTES:
        raise BadPeerCard(f"peer card has {len(wire)} bytes, limit {MAX_CARD_BYTES}")
    signature, payload = wire[:_SIGNATURE_BYTES], wire[_SIGNATURE_BYTES:]
    if not hmac.compare_digest(signature, _sign(payload, secret)):
        raise BadPeerCard("peer card has a wrong signature; do all workers share one secret?")
    try:
        values = json.loads(payload)
        version = _integer(values["protocol_version"])
    except (ValueError, KeyError, TypeError):
        raise BadPeerCard("peer card is malformed") from None
    if version != PROTOCOL_VERSION:
        raise IncompatiblePeer(
            f"protocol version: {PROTOCOL_VERSION} here, {version} there; run one release"
        )
    try:
        found, expires_at_s = _bytes(values["nonce"]), float(values["expires_at_s"])
    except (ValueError, KeyError, TypeError):
        raise BadPeerCard("peer card is malformed") from None
    if not hmac.compare_digest(found, nonce):
        raise BadPeerCard("peer card was replayed or made for another connection")
    if expires_at_s <= now_s:
        raise BadPeerCard(f"peer card expired {now_s - expires_at_s:.0f} s ago; ask for a new one")
    try:
        return _from_plain(values)
    except (ValueError, KeyError, TypeError, BatonError):
        raise BadPeerCard("peer card is malformed") from None


def check_compatible(card: PeerCard, *, layout: KvLayout) -> None:
    """Raises IncompatiblePeer naming what differs. Block sizes may: one must divide the other."""
    obstacle = layout_obstacle(card.layout, layout)
    if obstacle:
        raise IncompatiblePeer(f"KV of {card.worker_id} does not fit: {obstacle}")


def _check_nonce(nonce: bytes) -> None:
    if not MIN_NONCE_BYTES <= len(nonce) <= MAX_NONCE_BYTES:
        raise BadPeerCard(
            f"nonce has {len(nonce)} bytes; {MIN_NONCE_BYTES} to {MAX_NONCE_BYTES} are allowed"
        )


def _sign(payload: bytes, secret: bytes) -> bytes:
    return hmac.digest(secret, _CONTEXT + payload, "sha256")


def _plain(card: PeerCard) -> dict[str, Any]:
    values = asdict(card)
    values["nonce"] = _encoded(card.nonce)
    values["endpoints"] = [
        {"transport": endpoint.transport}
        | {name: _encoded(value) for name, value in asdict(endpoint).items()}
        for endpoint in card.endpoints
    ]
    return values


def _from_plain(values: dict[str, Any]) -> PeerCard:
    card = PeerCard(
        worker_id=WorkerId(_text(values["worker_id"])),
        epoch=Epoch(_text(values["epoch"])),
        layout=KvLayout(**values["layout"]),
        num_blocks=_integer(values["num_blocks"]),
        num_scratch_blocks=_integer(values["num_scratch_blocks"]),
        tp_rank=_integer(values["tp_rank"]),
        tp_size=_integer(values["tp_size"]),
        host_id=_text(values["host_id"]),
        pid_namespace=_text(values["pid_namespace"]),
        pid=_integer(values["pid"]),
        endpoints=tuple(_endpoint(endpoint) for endpoint in values["endpoints"]),
        nonce=_bytes(values["nonce"]),
        issued_at_s=float(values["issued_at_s"]),
        expires_at_s=float(values["expires_at_s"]),
        protocol_version=_integer(values["protocol_version"]),
    )
    _check_nonce(card.nonce)
    if card.pid < 1 or not 0 <= card.num_scratch_blocks < card.num_blocks:
        raise ValueError("card values out of range")
    # Raises when no model has such a rank.
    _ = card.pool
    return card


def _endpoint(values: dict[str, Any]) -> Endpoint:
    kind = _ENDPOINTS[_text(values["transport"])]
    return kind(**{f.name: _READERS[str(f.type)](values[f.name]) for f in fields(kind)})


def _encoded(value: object) -> object:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise TypeError("not an unsigned integer")
    return value


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError("not a truth value")
    return value


def _bytes(value: object) -> bytes:
    return base64.b64decode(_text(value), validate=True)


_READERS: dict[str, Callable[[object], Any]] = {
    "str": _text,
    "int": _integer,
    "bool": _truth,
    "bytes": _bytes,
}
"""By the annotation of an endpoint's field."""
