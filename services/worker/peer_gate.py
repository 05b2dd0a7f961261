"""Who may read this worker's KV: the door of the Transfer service.

 1. challenge: a reader says who it is and gets a nonce.
 2. admit: its card must be signed with the deployment's secret over that nonce, fit our layout,
    and speak for a registered worker. Each nonce is good for one card, for a few seconds.
 3. check: a lease stream is opened by a reader that was admitted and is still a member.

A refusal names its reason to the reader, is counted, and is logged once a minute for each reason
and peer. Not known here: leases, requests, links.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NoReturn

from baton.core.clock import Clock
from baton.core.errors import BadPeerCard, BatonError, IncompatiblePeer, Unavailable
from baton.core.kv_layout import KvLayout
from baton.core.request import PeerRef
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer.group_card import open_cards
from kvtransfer.metadata import PeerCard, check_compatible
from services.worker.nonces import Nonces, NonceVerdict
from services.worker.peer_members import PeerMembers, Standing

logger = logging.getLogger(__name__)

MEMBER_GRACE_S = 3.0
"""How long a card waits for its worker to be registered; below `transfer.connect_timeout_s`."""
MAX_WAITING = 256
"""Cards whose workers are not registered yet."""
MAX_ADMITTED = 4096
MAX_ID_CHARS = 128
LOG_PERIOD_S = 60.0
MAX_LOGGED = 1024


class Refusal(Enum):
    """Why a reader was turned away."""

    BAD_NAME = "bad name"
    BAD_CARD = "bad card"
    """Size, signature, shape, expiry, or over another nonce than the one shown."""
    UNKNOWN_NONCE = "unknown nonce"
    """Not ours, of our last life, or asked for in another worker's name."""
    LATE = "late"
    REPLAYED = "replayed"
    INCOMPATIBLE = "incompatible"
    OUTDATED = "outdated"
    NOT_A_MEMBER = "not a member"
    NOT_ADMITTED = "not admitted"
    TOO_MANY = "too many"


_OF_VERDICT = {
    NonceVerdict.UNKNOWN: Refusal.UNKNOWN_NONCE,
    NonceVerdict.LATE: Refusal.LATE,
    NonceVerdict.REPLAYED: Refusal.REPLAYED,
    NonceVerdict.TOO_MANY: Refusal.TOO_MANY,
}


class PeerGate:
    """One per worker; everything runs on one event loop."""

    def __init__(
        self,
        *,
        secret: bytes,
        layout: KvLayout,
        members: PeerMembers,
        clock: Clock,
        wall_clock: Clock,
        member_grace_s: float = MEMBER_GRACE_S,
    ) -> None:
        """`clock` times nonces, `wall_clock` the cards."""
        self._secret = secret
        self._layout = layout
        self._members = members
        self._clock = clock
        self._wall_clock = wall_clock
        self._member_grace_s = member_grace_s
        self._nonces = Nonces(clock)
        self._admitted: dict[tuple[WorkerId, Epoch], None] = {}
        self._num_waiting = 0
        self._refusals = dict.fromkeys(Refusal, 0)
        self._logged: dict[tuple[Refusal, str], tuple[float, int]] = {}
        self._has_warned_of_no_source = False

    @property
    def refusals(self) -> Mapping[Refusal, int]:
        """Counted since start."""
        return self._refusals

    @property
    def num_refused(self) -> int:
        return sum(self._refusals.values())

    def members(self, router_id: str, peers: Sequence[PeerRef]) -> None:
        """A router says which workers it knows; replaces what it said before."""
        self._members.announce(router_id, peers)

    def router_gone(self, router_id: str) -> None:
        self._members.router_gone(router_id)

    def challenge(self, worker_id: str, epoch: str) -> bytes:
        """A nonce for one card of this worker. Raises BadPeerCard for unusable names."""
        if not all(0 < len(text) <= MAX_ID_CHARS for text in (worker_id, epoch)):
            error = BadPeerCard(
                f"worker id and epoch must have 1 to {MAX_ID_CHARS} characters, "
                f"got {len(worker_id)} and {len(epoch)}"
            )
            self._refuse(Refusal.BAD_NAME, "", error)
        return self._nonces.issue(_name(worker_id, epoch))

    def authenticate(self, card: bytes, *, challenge: bytes) -> PeerCard:
        """Open a card of anybody who holds the secret; uses up `challenge`.

        Raises BadPeerCard or IncompatiblePeer (protocol version).
        """
        try:
            # All ranks' cards, which say the same of their worker.
            opened, *_ = open_cards(
                card, self._secret, now_s=self._wall_clock.now(), nonce=challenge
            )
        except IncompatiblePeer as error:
            self._refuse(Refusal.INCOMPATIBLE, "", error)
        except BadPeerCard as error:
            self._refuse(Refusal.BAD_CARD, "", error)
        peer = opened.worker_id
        verdict = self._nonces.use(challenge, _name(peer, opened.epoch), peer=peer)
        if verdict is not NonceVerdict.GOOD:
            refused = BadPeerCard(f"the nonce of the card is {verdict.value}")
            self._refuse(_OF_VERDICT[verdict], peer, refused)
        return opened

    async def admit(self, card: bytes, *, challenge: bytes) -> PeerCard:
        """Open the card of a reader; it may open a lease stream from now on.

        Answers within the grace for members that are new. Raises BadPeerCard, IncompatiblePeer,
        or Unavailable when too many readers wait to be registered.
        """
        opened = self.authenticate(card, challenge=challenge)
        try:
            check_compatible(opened, layout=self._layout)
        except IncompatiblePeer as error:
            self._refuse(Refusal.INCOMPATIBLE, opened.worker_id, error)
        await self._require_member(opened.worker_id, opened.epoch)
        self._remember(opened.worker_id, opened.epoch)
        return opened

    async def check(self, worker_id: str, epoch: str) -> None:
        """Before leases are granted on a stream. Raises IncompatiblePeer."""
        reader = WorkerId(worker_id), Epoch(epoch)
        if reader not in self._admitted:
            error = IncompatiblePeer(
                f"reader {worker_id[:MAX_ID_CHARS]} has not connected with a card"
            )
            self._refuse(Refusal.NOT_ADMITTED, "", error)
        try:
            await self._require_member(*reader)
        except BatonError:
            self._admitted.pop(reader, None)
            raise

    async def _require_member(self, worker_id: WorkerId, epoch: Epoch) -> None:
        if self._num_waiting >= MAX_WAITING:
            waiting = f"{self._num_waiting} readers wait to be registered, limit {MAX_WAITING}"
            self._refuse(Refusal.TOO_MANY, worker_id, Unavailable(waiting))
        self._num_waiting += 1
        try:
            standing = await self._members.wait_until_member(
                worker_id, epoch, timeout_s=self._member_grace_s
            )
        finally:
            self._num_waiting -= 1
        match standing:
            case Standing.MEMBER:
                return
            case Standing.NO_SOURCE:
                self._warn_of_no_source(worker_id)
            case Standing.OUTDATED | Standing.OTHER_EPOCH:
                error = IncompatiblePeer(
                    f"worker {worker_id} is registered under another epoch than {epoch}: "
                    "it has restarted, or two workers have one id"
                )
                self._refuse(Refusal.OUTDATED, worker_id, error)
            case Standing.UNKNOWN:
                error = IncompatiblePeer(
                    f"worker {worker_id} is not registered in this deployment; "
                    "do all workers share one registry, or one router?"
                )
                self._refuse(Refusal.NOT_A_MEMBER, worker_id, error)

    def _remember(self, worker_id: WorkerId, epoch: Epoch) -> None:
        reader = (worker_id, epoch)
        self._admitted.pop(reader, None)
        self._admitted[reader] = None
        if len(self._admitted) > MAX_ADMITTED:
            del self._admitted[next(iter(self._admitted))]

    def _refuse(self, reason: Refusal, peer: str, error: BatonError) -> NoReturn:
        """`peer`: empty unless a card has proved it, so that made-up names fill no log."""
        self._refusals[reason] += 1
        self._log(reason, peer, error)
        raise error

    def _log(self, reason: Refusal, peer: str, error: BatonError) -> None:
        key, now_s = (reason, peer), self._clock.now()
        logged_at_s, num_silent = self._logged.pop(key, (float("-inf"), 0))
        if now_s - logged_at_s < LOG_PERIOD_S:
            self._logged[key] = (logged_at_s, num_silent + 1)
            return
        self._logged[key] = (now_s, 0)
        if len(self._logged) > MAX_LOGGED:
            del self._logged[next(iter(self._logged))]
        fields = {"reader": peer, "reason": reason.value, "num_since_last_line": num_silent}
        logger.warning(
            "reader %s refused: %s", peer or "of unproved name", error, extra={"fields": fields}
        )

    def _warn_of_no_source(self, worker_id: str) -> None:
        if not self._has_warned_of_no_source:
            self._has_warned_of_no_source = True
            logger.warning(
                "reader %s is admitted by its card alone: no registry is set and no router has "
                "announced workers yet",
                worker_id,
            )


def _name(worker_id: str, epoch: str) -> str:
    return f"{len(worker_id)}:{worker_id}{epoch}"
