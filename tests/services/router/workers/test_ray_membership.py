"""Workers as Ray Serve tells of them, without Ray running."""

from __future__ import annotations

import asyncio
import logging

import pytest

from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Epoch, Role, WorkerId, WorkerInfo
from baton.rpc.convert import worker_info_to_wire
from services.router.workers.membership import PushMembership

LAYOUT = KvLayout("m", 2, 1, 4, 4, "float32")
INFO = WorkerInfo(
    WorkerId("w"), Epoch("1"), Role.DECODE, "h:1", "m", LAYOUT, 8, 64, 4, "shm", 1
)  # fmt: skip


def record(**changes):
    message = worker_info_to_wire(INFO)
    for name, value in changes.items():
        setattr(message, name, value)
    return {"worker_info": message.SerializeToString().hex()}


@pytest.mark.filterwarnings("default")
async def test_replica_that_says_nonsense_hides_no_other(caplog):
    ray_membership = pytest.importorskip("services.router.workers.ray_membership")
    board, membership = ray_membership.ReplicaBoard(), PushMembership()
    board.listen(membership)
    strange = {"a": {"worker_info": "no hex"}, "b": {"worker_info": "ff"}, "c": record(role=99)}
    with caplog.at_level(logging.WARNING):
        board.publish("Decode", {**strange, "d": None, "e": {}, "f": record()})
        board.publish("Decode", {**strange, "f": record()})
    await asyncio.sleep(0)
    assert await anext(membership.watch()) == {"w": "h:1"}
    assert len(caplog.records) == 3 and "unknown role 99" in caplog.text
