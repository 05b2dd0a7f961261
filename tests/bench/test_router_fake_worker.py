from __future__ import annotations

from baton.core.worker_info import LoadReport, Role
from baton.rpc.convert import load_to_wire, worker_info_from_wire
from bench.router.fake_worker import welcome
from services.router.workers.kv_feed import hashing_difference


def test_made_up_workers_are_not_strangers_to_the_router() -> None:
    load = load_to_wire(LoadReport(free_blocks=9, total_blocks=9))
    message = welcome("w", Role.DECODE, "127.0.0.1:1", "m", load)
    info = worker_info_from_wire(message.info)
    assert info.num_blocks == 9 and hashing_difference(message.hashing, info.layout) == ""
