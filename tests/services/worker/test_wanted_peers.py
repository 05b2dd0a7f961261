"""Which peers are to be connected, and when again."""

from baton.core.request import PeerRef
from baton.core.worker_info import Epoch, WorkerId
from services.worker.wanted_peers import FIRST_RETRY_S, MAX_PEERS, MAX_RETRY_S, WantedPeers


def peer(name, epoch="e1"):
    return PeerRef(WorkerId(name), Epoch(epoch), f"{name}:1")


def test_lists_of_several_routers_are_joined():
    wanted = WantedPeers()
    assert wanted.replace("r1", [peer("a"), peer("b")]) == [peer("a"), peer("b")]
    assert wanted.replace("r2", [peer("b"), peer("c")]) == [peer("b"), peer("c")]
    assert wanted.worker_ids() == ["a", "b", "c"]
    wanted.replace("r1", [])
    assert wanted.worker_ids() == ["b", "c"]
    wanted.forget("r2")
    assert not len(wanted) and "b" not in wanted


def test_only_what_a_router_has_not_listed_before_is_new():
    wanted = WantedPeers()
    wanted.replace("r1", [peer("a")])
    assert wanted.replace("r1", [peer("a"), peer("b")]) == [peer("b")]
    assert wanted.replace("r1", [peer("a", "e2"), peer("b")]) == [peer("a", "e2")]


def test_pauses_between_attempts_grow_up_to_a_limit_and_end_with_success():
    wanted = WantedPeers()
    wanted.replace("r", [peer("a")])
    pauses, now_s = [], 0.0
    for _ in range(10):
        assert wanted.due("a", now_s) == peer("a")
        wanted.failed("a", now_s)
        start_s = now_s
        while wanted.due("a", now_s) is None:
            now_s += FIRST_RETRY_S / 2
        pauses.append(now_s - start_s)
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (FIRST_RETRY_S, MAX_RETRY_S)
    wanted.connected("a")
    wanted.failed("a", now_s)
    assert wanted.due("a", now_s + FIRST_RETRY_S) == peer("a")


def test_new_start_of_a_peer_is_tried_at_once():
    wanted = WantedPeers()
    wanted.replace("r", [peer("a")])
    for _ in range(8):
        wanted.failed("a", 0.0)
    assert wanted.due("a", 1.0) is None
    wanted.replace("r", [peer("a", "e2")])
    assert wanted.due("a", 1.0) == peer("a", "e2")


def test_starts_that_routers_disagree_on_are_tried_in_turn():
    wanted = WantedPeers()
    wanted.replace("r1", [peer("a", "old")])
    wanted.replace("r2", [peer("a", "new")])
    tried = []
    for _ in range(4):
        tried.append(wanted.due("a", float("inf")).epoch)
        wanted.failed("a", 0.0)
    assert tried == ["old", "new", "old", "new"]


def test_number_of_peers_is_bounded():
    wanted = WantedPeers()
    new = wanted.replace("r", [peer(f"w{i}") for i in range(MAX_PEERS + 5)])
    assert len(new) == len(wanted) == MAX_PEERS
