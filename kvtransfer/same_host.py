"""Whether the process behind a card can be reached through this kernel at all."""

from __future__ import annotations

from baton.core.errors import IncompatiblePeer
from kvtransfer.metadata import PeerCard
from kvtransfer.peer_process import host_id, pid_namespace


def check_same_host(card: PeerCard) -> None:
    """Raises IncompatiblePeer (reason and fix) for a peer whose pid means nothing here."""
    if card.host_id != host_id():
        raise IncompatiblePeer(f"{card.worker_id} runs on another host")
    if card.pid_namespace != pid_namespace():
        raise IncompatiblePeer(
            f"{card.worker_id} runs in another pid namespace; start both workers in one "
            "container or let the containers share their process namespace"
        )
