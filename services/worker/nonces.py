"""Nonces that cost nothing until they are used.

    nonce = time (8 bytes) + random (16 bytes) + HMAC(key of this process, time + random + name)

Asking for nonces leaves nothing behind, so nobody can fill our memory with questions. A used one is
remembered until it expires, which only a peer with a signed card can bring about.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from enum import Enum

from baton.core.clock import Clock

NONCE_LIFETIME_S = 10.0
"""Above `transfer.connect_timeout_s`: a reader has given up before its nonce ends."""
MAX_USED = 4096
MAX_USED_PER_PEER = 64
_HEAD = struct.Struct(">d16s")
_MAC_BYTES = 32
NONCE_BYTES = _HEAD.size + _MAC_BYTES


class NonceVerdict(Enum):
    GOOD = "good"
    UNKNOWN = "not of this worker, or asked for under another name; ask for a new one"
    LATE = f"older than {NONCE_LIFETIME_S:.0f} s; ask for a new one"
    REPLAYED = "used already"
    TOO_MANY = (
        f"one of more than {MAX_USED_PER_PEER} of this peer or {MAX_USED} in all within "
        f"{NONCE_LIFETIME_S:.0f} s; wait and try again"
    )


class Nonces:
    """Of one process: no nonce outlives it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._key = secrets.token_bytes(32)
        self._used: dict[bytes, tuple[float, str]] = {}
        """Nonce -> (when it expires, who used it)."""

    def issue(self, name: str) -> bytes:
        """A nonce that `name` alone can use, once."""
        head = _HEAD.pack(self._clock.now(), secrets.token_bytes(16))
        return head + self._mac(head, name)

    def use(self, nonce: bytes, name: str, *, peer: str) -> NonceVerdict:
        """Only after `name` has proved itself, over this nonce; `peer` is whom its use counts
        for."""
        head, mac = nonce[: _HEAD.size], nonce[_HEAD.size :]
        if len(nonce) != NONCE_BYTES or not hmac.compare_digest(mac, self._mac(head, name)):
            return NonceVerdict.UNKNOWN
        now_s = self._clock.now()
        expires_at_s = _HEAD.unpack(head)[0] + NONCE_LIFETIME_S
        if now_s >= expires_at_s:
            return NonceVerdict.LATE
        self._used = {n: use for n, use in self._used.items() if use[0] > now_s}
        if nonce in self._used:
            return NonceVerdict.REPLAYED
        num_own = sum(user == peer for _, user in self._used.values())
        if len(self._used) >= MAX_USED or num_own >= MAX_USED_PER_PEER:
            return NonceVerdict.TOO_MANY
        self._used[nonce] = (expires_at_s, peer)
        return NonceVerdict.GOOD

    def _mac(self, head: bytes, name: str) -> bytes:
        return hmac.digest(self._key, head + name.encode(), "sha256")
