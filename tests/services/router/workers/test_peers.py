from __future__ import annotations

import asyncio
import dataclasses

from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Role, WorkerInfo
from services.router.workers.peers import peers_of

LAYOUT = KvLayout("m", 2, 1, 8, 16, "float32")
OTHER = dataclasses.replace(LAYOUT, model_id="n")


def info(name, *, layout=LAYOUT, model="m", epoch="1"):
    role = Role.PREFILL if name.startswith("p") else Role.DECODE
    return WorkerInfo(name, epoch, role, f"h:{name}", model, layout, 10, 64, 4, "fake", 1)


def test_everyone_of_a_layout_may_read_everyone_else():
    found = peers_of([info("d1"), info("p0"), info("d0")])
    names = {w.worker_id: [p.worker_id for p in peers] for w, peers in found.items()}
    assert names == {"d0": ["d1", "p0"], "d1": ["d0", "p0"], "p0": ["d0", "d1"]}
    peer = found[info("p0")][0]
    assert (peer.epoch, peer.address) == ("1", "h:d0")


def test_other_layouts_and_models_are_no_peers():
    workers = [info("d0"), info("d1", layout=OTHER), info("d2", model="x"), info("d3")]
    found = {w.worker_id: [p.worker_id for p in peers] for w, peers in peers_of(workers).items()}
    assert found == {"d0": ["d3"], "d3": ["d0"], "d1": [], "d2": []}


def test_block_sizes_may_differ():
    larger = dataclasses.replace(LAYOUT, block_size=64)
    workers = [info("p0", layout=larger), info("d0"), info("d1", layout=larger)]
    found = {w.worker_id: [p.worker_id for p in peers] for w, peers in peers_of(workers).items()}
    assert found == {"d0": ["d1", "p0"], "d1": ["d0", "p0"], "p0": ["d0", "d1"]}


def test_nobody_and_one_alone():
    assert peers_of([]) == {}
    assert peers_of([info("d0")]) == {info("d0"): ()}


# Over the sessions.


def told(worker):
    """The peers a worker has been told of last."""
    return [peer.worker_id for peer in worker.peers[-1]] if worker.peers else None


async def until_told(cluster, expected):
    async with asyncio.timeout(4):
        while {name: told(cluster[name]) for name in expected} != expected:
            await asyncio.sleep(0.01)


async def test_workers_that_come_up_together_hear_of_each_other_at_once(make_cluster):
    cluster = await make_cluster(1, 2)
    await until_told(cluster, {"p0": ["d0", "d1"], "d0": ["d1", "p0"], "d1": ["d0", "p0"]})
    assert all(len(worker.peers) <= 2 for worker in cluster.workers.values())


async def test_member_that_leaves_is_no_peer_any_more(make_cluster):
    cluster = await make_cluster(1, 2)
    await until_told(cluster, {"p0": ["d0", "d1"], "d0": ["d1", "p0"]})
    everyone = {w.worker_id: w.address for w in cluster.workers.values()}
    cluster.membership.update({k: v for k, v in everyone.items() if k != "d1"})
    await until_told(cluster, {"p0": ["d0"], "d0": ["p0"]})
    cluster.membership.update(everyone)
    await until_told(cluster, {"p0": ["d0", "d1"], "d0": ["d1", "p0"], "d1": ["d0", "p0"]})


async def test_lost_worker_stays_a_peer_until_it_comes_back_as_another(make_cluster):
    cluster = await make_cluster(1, 2)
    await until_told(cluster, {"p0": ["d0", "d1"], "d0": ["d1", "p0"]})
    count = len(cluster["p0"].peers)
    await cluster["d1"].kill()
    await cluster.connected("p0", "d0")
    await asyncio.sleep(0.3)
    assert len(cluster["p0"].peers) == count
    await cluster["d1"].revive()
    await until_told(cluster, {"d1": ["d0", "p0"]})
    async with asyncio.timeout(3):
        while len(cluster["p0"].peers) == count:
            await asyncio.sleep(0.01)
    (peer,) = [p for p in cluster["p0"].peers[-1] if p.worker_id == "d1"]
    assert peer.epoch == "2" and peer.address == cluster["d1"].address


async def test_what_has_not_changed_is_not_repeated(cluster):
    await until_told(cluster, {"p0": ["d0"], "d0": ["p0"]})
    count = len(cluster["p0"].peers)
    cluster.core.pool._notify()
    await asyncio.sleep(0.3)
    assert len(cluster["p0"].peers) == count


async def test_new_session_of_a_worker_hears_of_its_peers_again(cluster):
    await until_told(cluster, {"p0": ["d0"], "d0": ["p0"]})
    cluster["p0"].peers.clear()
    cluster.core.pool.session("p0").break_off("test")
    await until_told(cluster, {"p0": ["d0"]})


async def test_leaving_worker_remains_a_peer_while_it_has_requests(make_cluster):
    cluster = await make_cluster(0, 2)
    for worker in cluster.workers.values():
        worker.faults.takeover_fails_in = "reading"
        worker.step_s = 0.01
    task = asyncio.create_task(cluster.generate([1] * 50, 60))
    async with asyncio.timeout(3):
        while not (busy := [w for w in cluster.workers.values() if w.live]):
            await asyncio.sleep(0.002)
    idle = next(w for w in cluster.workers.values() if w is not busy[0])
    await until_told(cluster, {idle.worker_id: [busy[0].worker_id]})
    cluster.membership.update({idle.worker_id: idle.address})
    await asyncio.sleep(0.3)
    assert told(idle) == [busy[0].worker_id] and not task.done()
    await task
    await until_told(cluster, {idle.worker_id: []})
