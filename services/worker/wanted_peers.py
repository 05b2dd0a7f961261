"""Which peers the routers want this worker to be connected to, and when to try again. Pure.

The lists of all routers are joined. Routers may know different starts of one worker for a moment:
then each is tried in turn, since only the worker itself knows which one lives.

Not known here: links, clocks (times come in).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from baton.core.request import PeerRef
from baton.core.worker_info import WorkerId

FIRST_RETRY_S = 0.25
MAX_RETRY_S = 8.0
MAX_PEERS = 4096
"""Of all routers together; what is listed beyond is connected when a request needs it."""


@dataclass(slots=True)
class _Wanted:
    refs: list[PeerRef] = field(default_factory=list)
    num_failures: int = 0
    retry_at_s: float = 0.0


class WantedPeers:
    """The joined lists of all routers."""

    def __init__(self) -> None:
        self._lists: dict[Hashable, tuple[PeerRef, ...]] = {}
        self._wanted: dict[WorkerId, _Wanted] = {}

    def __contains__(self, worker_id: WorkerId) -> bool:
        return worker_id in self._wanted

    def __len__(self) -> int:
        return len(self._wanted)

    def replace(self, router: Hashable, peers: Iterable[PeerRef]) -> list[PeerRef]:
        """A router's new list; returns those of it that it did not list before."""
        before = set(self._lists.get(router, ()))
        self._lists[router] = tuple(dict.fromkeys(peers))
        self._join()
        new = [peer for peer in self._lists[router] if peer not in before]
        for peer in new:
            # Whatever failed before was another start of it, or before it was ready.
            wanted = self._wanted.get(peer.worker_id)
            if wanted is not None:
                wanted.num_failures, wanted.retry_at_s = 0, 0.0
        return [peer for peer in new if peer.worker_id in self._wanted]

    def forget(self, router: Hashable) -> None:
        """The router's session has ended."""
        if self._lists.pop(router, None) is not None:
            self._join()

    def due(self, worker_id: WorkerId, now_s: float) -> PeerRef | None:
        """What to connect to now for a wanted peer without a link; None while it is too early."""
        wanted = self._wanted[worker_id]
        if now_s < wanted.retry_at_s:
            return None
        return wanted.refs[wanted.num_failures % len(wanted.refs)]

    def worker_ids(self) -> list[WorkerId]:
        return list(self._wanted)

    def is_untried(self, worker_id: WorkerId) -> bool:
        """Whether no attempt to connect to this wanted peer has failed since it was listed."""
        return self._wanted[worker_id].num_failures == 0

    def connected(self, worker_id: WorkerId) -> None:
        wanted = self._wanted.get(worker_id)
        if wanted is not None:
            wanted.num_failures, wanted.retry_at_s = 0, 0.0

    def failed(self, worker_id: WorkerId, now_s: float) -> None:
        """The link could not be made, or has ended."""
        wanted = self._wanted.get(worker_id)
        if wanted is not None:
            delay_s = min(MAX_RETRY_S, FIRST_RETRY_S * 2 ** min(wanted.num_failures, 16))
            wanted.num_failures += 1
            wanted.retry_at_s = now_s + delay_s

    def _join(self) -> None:
        joined: dict[WorkerId, _Wanted] = {}
        for peers in self._lists.values():
            for peer in peers:
                if peer.worker_id not in joined:
                    if len(joined) >= MAX_PEERS:
                        continue
                    known = self._wanted.get(peer.worker_id, _Wanted())
                    joined[peer.worker_id] = _Wanted([], known.num_failures, known.retry_at_s)
                refs = joined[peer.worker_id].refs
                if peer not in refs:
                    refs.append(peer)
        self._wanted = joined
