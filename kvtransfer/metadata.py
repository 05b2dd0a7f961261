"""Peer cards: what a worker tells others so that they may read its KV pool.

    wire = HMAC-SHA256(secret, context + JSON) (32 bytes) + JSON

A card is a capability to the memory of a process: it travels over the control plane only and is
never logged. Checks come in this order, each before anything behind it is looked at: size,
signature, shape and expiry, protocol version, compatibility. The link's own metadata (the agent
blob) is opened last, by the transport: a truncated blob makes NIXL forget a good peer.

Version 1: first version.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from dataclasses import asdict, dataclass
from typing import Any

from baton.core.errors import BadPeerCard, BatonError, IncompatiblePeer
from baton.core.kv_layout import KvLayout
from baton.core.worker_info import PROTOCOL_VERSION, Epoch, WorkerId

MAX_CARD_BYTES = 64 << 10
CARD_LIFETIME_S = 3600.0
"""A card is made anew for every exchange; this bounds the use of a stolen one."""
CANARY_BYTES = 32
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

    agent_name: str
    agent_blob: bytes
    pool_address: int
    device_id: int


@dataclass(frozen=True, slots=True)
class ShmEndpoint:
    """Where the file with the pool can be opened by processes of the same user."""

    path: str
    file_bytes: int
    pool_offset: int


Endpoint = NixlEndpoint | ShmEndpoint | None


@dataclass(frozen=True, slots=True)
class PeerCard:
    """One process lifetime of one worker."""

    worker_id: WorkerId
    epoch: Epoch
    transport: str
    layout: KvLayout
    num_blocks: int
    host_id: str
    pid_namespace: str
    pid: int
    canary_address: int
    """Where `canary` lies: an address in the process (nixl), an offset in the file (shm)."""
    canary: bytes
    """Random bytes; reading them proves that we reach the process that made the card."""
    endpoint: Endpoint
    issued_at_s: float
    """Unix time."""
    expires_at_s: float
    protocol_version: int = PROTOCOL_VERSION

    @property
    def identity(self) -> PeerIdentity:
        return PeerIdentity(self.worker_id, self.epoch)


def seal_card(card: PeerCard, secret: bytes) -> bytes:
    """The signed wire form. Raises BadPeerCard when it would exceed what a peer accepts."""
    payload = json.dumps(_plain(card), sort_keys=True).encode()
    wire = _sign(payload, secret) + payload
    if len(wire) > MAX_CARD_BYTES:
        raise BadPeerCard(f"own card has {len(wire)} bytes, limit {MAX_CARD_BYTES}")
    return wire


def open_card(wire: bytes, secret: bytes, *, now_s: float) -> PeerCard:
    """Verify a card and read it. `now_s` is Unix time.

    Raises BadPeerCard (size, signature, shape, expiry) or IncompatiblePeer (protocol version).
    """
    if not _SIGNATURE_BYTES < len(wire) <= MAX_CARD_BYTES:
        raise BadPeerCard(f"peer card has {len(wire)} bytes, limit {MAX_CARD_BYTES}")
    signature, payload = wire[:_SIGNATURE_BYTES], wire[_SIGNATURE_BYTES:]
    if not hmac.compare_digest(signature, _sign(payload, secret)):
        raise BadPeerCard("peer card has a wrong signature; do all workers share one secret?")
    try:
        values = json.loads(payload)
        expires_at_s = float(values["expires_at_s"])
        version = int(values["protocol_version"])
    except (ValueError, KeyError, TypeError):
        raise BadPeerCard("peer card is malformed") from None
    if expires_at_s <= now_s:
        raise BadPeerCard(f"peer card expired {now_s - expires_at_s:.0f} s ago; ask for a new one")
    if version != PROTOCOL_VERSION:
        raise IncompatiblePeer(
            f"protocol version: {PROTOCOL_VERSION} here, {version} there; run one release"
        )
    try:
        return _from_plain(values)
    except (ValueError, KeyError, TypeError, BatonError):
        raise BadPeerCard("peer card is malformed") from None


def check_compatible(card: PeerCard, *, layout: KvLayout, transport: str) -> None:
    """Raises IncompatiblePeer naming what differs."""
    if card.layout.fingerprint != layout.fingerprint:
        raise IncompatiblePeer(
            f"KV of {card.worker_id} does not fit: {layout.difference(card.layout)}"
        )
    if card.transport != transport:
        raise IncompatiblePeer(
            f"KV transport: {transport} here, {card.transport} at {card.worker_id}; "
            "set the same one for all workers"
        )


def _sign(payload: bytes, secret: bytes) -> bytes:
    return hmac.digest(secret, _CONTEXT + payload, "sha256")


def _plain(card: PeerCard) -> dict[str, Any]:
    values = asdict(card)
    values["canary"] = card.canary.hex()
    if isinstance(card.endpoint, NixlEndpoint):
        values["endpoint"]["agent_blob"] = base64.b64encode(card.endpoint.agent_blob).decode()
    return values


def _from_plain(values: dict[str, Any]) -> PeerCard:
    card = PeerCard(
        worker_id=WorkerId(_text(values["worker_id"])),
        epoch=Epoch(_text(values["epoch"])),
        transport=_text(values["transport"]),
        layout=KvLayout(**values["layout"]),
        num_blocks=int(values["num_blocks"]),
        host_id=_text(values["host_id"]),
        pid_namespace=_text(values["pid_namespace"]),
        pid=int(values["pid"]),
        canary_address=int(values["canary_address"]),
        canary=bytes.fromhex(values["canary"]),
        endpoint=_endpoint(values["endpoint"]),
        issued_at_s=float(values["issued_at_s"]),
        expires_at_s=float(values["expires_at_s"]),
        protocol_version=int(values["protocol_version"]),
    )
    if card.num_blocks < 1 or card.pid < 1 or len(card.canary) != CANARY_BYTES:
        raise ValueError("card values out of range")
    return card


def _endpoint(values: dict[str, Any] | None) -> Endpoint:
    if values is None:
        return None
    if "agent_name" in values:
        return NixlEndpoint(
            _text(values["agent_name"]),
            base64.b64decode(values["agent_blob"], validate=True),
            int(values["pool_address"]),
            int(values["device_id"]),
        )
    return ShmEndpoint(_text(values["path"]), int(values["file_bytes"]), int(values["pool_offset"]))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value
