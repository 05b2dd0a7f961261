"""Blocks saved from a real engine's pool beside its work, and restored into it.

The engine is the CPU engine with a tiny model: KV that is wrong by a byte makes other tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
from dataclasses import replace

import pytest

from baton.core.block import BlockId, chain_hashes, root_hash
from baton.core.clock import MonotonicClock
from baton.core.errors import ConfigError, InternalError, TransferError, Unavailable
from baton.core.fabric import FabricCounters
from baton.core.request import GenerateRequest, RequestId, SamplingParams, Work
from baton.core.tier import Tier
from baton.core.worker_info import LoadReport
from baton.engine.config import EngineConfig
from baton.engine.factory import build_engine
from kvtransfer.tiers.config import TierConfig
from kvtransfer.tiers.copier import HostCopier
from kvtransfer.tiers.tiers import build_tiers
from kvtransfer.transport import PoolRegion
from services.worker import tiering as tiering_module
from services.worker.engine_loop import EngineLoop
from services.worker.tier_backend import build_tiering
from services.worker.tiering import Tiering
from tiny_llama import write_checkpoint

BLOCK_SIZE = 16
NUM_BLOCKS = 24
VOCAB_SIZE = 320
MIB = 1 << 20
FAST = TierConfig(
    host_bytes=4 * MIB,
    save_bytes_per_second=1 << 40,
    disk_bytes_per_second=1 << 40,
    save_below_free_ratio=1.0,
    retry_s=0.2,
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


class Server:
    """An engine loop with tiers beside it, and what the worker does with both."""

    def __init__(self, checkpoint, config):
        engine = EngineConfig(
            checkpoint,
            dtype="float32",
            block_size=BLOCK_SIZE,
            kv_cache_bytes=NUM_BLOCKS * 12 * 1024,
            max_model_len=384,
            max_num_batched_tokens=128,
            num_threads=1,
        )
        self.built = build_engine(engine, clock=MonotonicClock())
        assert self.built.num_blocks == NUM_BLOCKS
        self.region = PoolRegion(
            self.built.pool_address, self.built.pool_bytes, NUM_BLOCKS, self.built.layout
        )
        self.loop = EngineLoop(self.built.engine, on_step=self._on_step, clock=MonotonicClock())
        self.tiering = build_tiering(config, self.region, self.loop)
        self._ends = {}
        self._tokens = {}
        self._num_imports = 0
        self.sequence = 0
        self.tier_of = {}
        """What routers would know."""

    async def __aenter__(self):
        self.loop.start()
        self.tiering.start()
        return self

    async def __aexit__(self, *_):
        await self.tiering.stop()
        await self.loop.check_integrity()
        assert await self.loop.is_empty()
        await self.loop.stop()

    def _on_step(self, result):
        self.tiering.on_load(result.load)
        if result.kv_event is not None:
            assert result.kv_sequence == self.sequence + 1
            self.sequence += 1
            self._told(result.kv_event)
        for delta in result.output.deltas:
            self._tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            if delta.finish_reason is not None:
                self._ends[delta.request_id].set_result(delta)

    def _told(self, event):
        named = [*event.stored, *event.removed, *event.on_host, *event.on_disk]
        assert len(set(named)) == len(named), "a block is named twice in an event"
        for block_hash in event.removed:
            self.tier_of.pop(block_hash, None)
        parts = (event.stored, event.on_host, event.on_disk)
        for tier, part in zip(Tier, parts, strict=True):
            self.tier_of.update(dict.fromkeys(part, tier))

    async def check_told(self):
        """Routers know of every block its best tier, once all is quiet."""
        await eventually(lambda: self.tiering.is_quiet and not self.tiering._tiers.has_changes)
        # One step more for what was noted in this moment.
        self.loop.tell_tiers()
        snapshot = await self.loop.snapshot()
        await asyncio.sleep(0)
        said = {
            Tier.DEVICE: snapshot.cached_hashes,
            Tier.HOST: snapshot.host_hashes,
            Tier.DISK: snapshot.disk_hashes,
        }
        assert self.tier_of == {h: tier for tier, part in said.items() for h in part}
        assert len(self.tier_of) == sum(map(len, said.values()))

    def hashes(self, prompt):
        return chain_hashes(root_hash(self.built.layout.fingerprint), prompt, BLOCK_SIZE)

    async def generate(self, name, prompt):
        """The tokens, and how many of the prompt's were found in the cache."""
        name = RequestId(name)
        self._ends[name] = asyncio.get_running_loop().create_future()
        self.loop.submit(
            GenerateRequest(
                request_id=name,
                work=Work.GENERATE,
                prompt_token_ids=tuple(prompt),
                sampling=SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True),
                block_hashes=tuple(self.hashes(prompt)),
            )
        )
        end = await asyncio.wait_for(self._ends[name], 20)
        return self._tokens[name], end.num_cached_tokens

    async def restore(self, prompt):
        """Restore what the pool lacks of a prompt; blocks that came back."""
        self._num_imports += 1
        name = RequestId(f"import-{self._num_imports}")
        hashes = self.hashes(prompt)
        reservation = await self.loop.reserve_import(name, hashes)
        if reservation is None:
            return 0
        first = reservation.num_cached_blocks
        block_ids = reservation.block_ids[first:]
        count = await self.tiering.restore(hashes[first : first + len(block_ids)], block_ids)
        self.loop.finish_import(name, num_blocks=first + count)
        return count

    async def saved(self, prompt, within_s=20.0):
        """Wait until the tiers hold all of a prompt."""
        hashes = self.hashes(prompt)
        await eventually(lambda: self.tiering.restorable(hashes) == len(hashes), within_s)

    @property
    def counters(self):
        counters = FabricCounters()
        self.tiering.count(counters)
        return counters


async def eventually(claim, within_s=20.0):
    async with asyncio.timeout(within_s):
        while not claim():
            await asyncio.sleep(0.005)


def prompts(count, *, num_tokens=10 * BLOCK_SIZE + 3):
    rng = random.Random(7)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(num_tokens)] for _ in range(count)]


@contextlib.contextmanager
def nothing_left(path=None):
    """No thread, descriptor or temporary file stays."""
    threads = set(threading.enumerate())
    descriptors = os.listdir("/proc/self/fd")
    yield
    left = {
        t.name for t in set(threading.enumerate()) - threads if not t.name.startswith("asyncio_")
    }
    assert not left
    assert len(os.listdir("/proc/self/fd")) <= len(descriptors)
    assert path is None or not [p for p in path.rglob("*") if p.suffix == ".new"]


async def test_evicted_prompt_is_restored_and_gives_the_same_tokens(checkpoint):
    with nothing_left():
        async with Server(checkpoint, FAST) as server:
            first, *others = prompts(6)
            tokens, num_cached = await server.generate("first", first)
            assert num_cached == 0
            await server.saved(first)
            for number, other in enumerate(others):
                await server.generate(f"other-{number}", other)
                await server.saved(other)
            snapshot = await server.loop.snapshot()
            assert not set(snapshot.cached_hashes) & set(server.hashes(first)), "all evicted"
            assert await server.restore(first) == 10
            assert await server.generate("again", first) == (tokens, 10 * BLOCK_SIZE)
            assert server.counters.restored_blocks == 10
            assert server.counters.saved_blocks >= 60
            await server.check_told()
            assert set(server.tier_of.values()) == {Tier.DEVICE, Tier.HOST}
            assert server.counters.corrupt_blocks == 0


async def test_restarted_worker_finds_its_blocks_on_disk(checkpoint, tmp_path):
    config = replace(FAST, disk_bytes=64 * MIB, disk_path=tmp_path)
    (prompt,) = prompts(1)
    with nothing_left(tmp_path):
        async with Server(checkpoint, config) as server:
            tokens, _ = await server.generate("first", prompt)
            await server.saved(prompt)
        async with Server(checkpoint, config) as server:
            await server.saved(prompt)
            host, disk = server.tiering.reports()
            assert (host.num_blocks, disk.num_blocks) == (0, 10)
            await server.check_told()
            assert server.tier_of == dict.fromkeys(server.hashes(prompt), Tier.DISK)
            assert await server.restore(prompt) == 10
            assert await server.generate("again", prompt) == (tokens, 10 * BLOCK_SIZE)


async def test_corrupt_block_on_disk_is_computed_again(checkpoint, tmp_path):
    config = replace(FAST, disk_bytes=64 * MIB, disk_path=tmp_path)
    (prompt,) = prompts(1)
    async with Server(checkpoint, config) as server:
        tokens, _ = await server.generate("first", prompt)
        await server.saved(prompt)
    (slab,) = tmp_path.glob("worker-*/slab-*.kv")
    data = bytearray(slab.read_bytes())
    # The most recently used block, the prompt's first, was written first.
    data[-5 * 12 * 1024] ^= 4
    slab.write_bytes(data)
    async with Server(checkpoint, config) as server:
        await server.saved(prompt)
        num_restored = await server.restore(prompt)
        assert 0 < num_restored < 10
        assert server.counters.corrupt_blocks == 1
        again, num_cached = await server.generate("again", prompt)
        assert again == tokens
        assert num_cached == num_restored * BLOCK_SIZE


async def test_blocks_go_through_host_and_disk_under_load(checkpoint, tmp_path):
    """More prompts than pool and host tier hold, in random order, restored where possible."""
    block_bytes = 12 * 1024
    config = replace(FAST, host_bytes=30 * block_bytes, disk_bytes=64 * MIB, disk_path=tmp_path)
    chosen = prompts(8, num_tokens=6 * BLOCK_SIZE + 1)
    rng = random.Random(3)
    with nothing_left(tmp_path):
        async with Server(checkpoint, config) as server:
            right = {}
            for turn in range(40):
                number = rng.randrange(len(chosen))
                await server.restore(chosen[number])
                tokens, _ = await server.generate(f"turn-{turn}", chosen[number])
                assert right.setdefault(number, tokens) == tokens
                # What left the host before it was written is lost to the tiers, as it may be.
                with contextlib.suppress(TimeoutError):
                    await server.saved(chosen[number], within_s=1.0)
            assert server.counters.restored_blocks > 20
            assert server.counters.corrupt_blocks == 0
            host, disk = server.tiering.reports()
            assert host.num_bytes <= host.max_bytes
            assert disk.num_blocks > 0 and disk.reason == ""
            await eventually(lambda: server.tiering.is_quiet)
            await server.check_told()
            assert set(server.tier_of.values()) == set(Tier)


async def test_serving_goes_on_without_a_usable_disk(checkpoint, tmp_path):
    (tmp_path / "kv").write_text("in the way")
    config = replace(FAST, disk_bytes=64 * MIB, disk_path=tmp_path / "kv")
    first, second = prompts(2)
    async with Server(checkpoint, config) as server:
        await server.generate("first", first)
        await server.saved(first)
        await eventually(lambda: "cannot be opened" in server.tiering.reports()[1].reason)
        (tmp_path / "kv").unlink()
        await server.generate("second", second)
        await eventually(lambda: server.tiering.reports()[1].reason == "")


async def test_idle_worker_asks_its_engine_nothing(checkpoint):
    async with Server(checkpoint, FAST) as server:
        (prompt,) = prompts(1)
        await server.generate("first", prompt)
        await server.saved(prompt)
        asked = []
        real = server.loop.take_unsaved

        async def take(max_blocks):
            asked.append(max_blocks)
            return await real(max_blocks)

        server.loop.take_unsaved = take
        await asyncio.sleep(tiering_module.IDLE_PAUSE_S * 4)
        assert len(asked) <= 1


async def test_empty_pool_is_not_saved(checkpoint):
    async with Server(checkpoint, replace(FAST, save_below_free_ratio=0.1)) as server:
        (prompt,) = prompts(1, num_tokens=3 * BLOCK_SIZE)
        await server.generate("first", prompt)
        await asyncio.sleep(0.1)
        assert server.counters.saved_blocks == 0


class StubEngine:
    """Hands out the same blocks until they are saved."""

    def __init__(self, hashes):
        self.unsaved = [(h, BlockId(i)) for i, h in enumerate(hashes)]
        self.leased = set()
        self.is_stopped = False

    async def take_unsaved(self, max_blocks):
        if self.is_stopped:
            raise Unavailable("stopped")
        taken = self.unsaved[:max_blocks]
        del self.unsaved[:max_blocks]
        self.leased |= {block_id for _, block_id in taken}
        return taken

    def attach_tiers(self, tiers):
        """Tells nobody."""

    def tell_tiers(self):
        """Tells nobody."""

    def release_saved(self, block_ids, *, is_saved):
        assert self.leased >= set(block_ids)
        self.leased -= set(block_ids)


class SlowEngine(StubEngine):
    """Answers after a step of 50 ms."""

    def __init__(self, hashes):
        super().__init__(hashes)
        self.asked = []

    async def take_unsaved(self, max_blocks):
        self.asked.append(max_blocks)
        await asyncio.sleep(0.05)
        return await super().take_unsaved(max_blocks)


class GatedCopier:
    """Copies when the gate is open; fails when told to."""

    def __init__(self, region):
        self._real = HostCopier(region)
        self.gate = threading.Event()
        self.gate.set()
        self.fail = False
        self.is_closed = False

    def register(self, arena):
        self._check()

    def copy_out(self, block_ids, slots):
        self._check()
        self._real.copy_out(block_ids, slots)

    def copy_in(self, slots, block_ids):
        self._check()
        self._real.copy_in(slots, block_ids)

    def close(self):
        self.is_closed = True

    def _check(self):
        assert self.gate.wait(20)
        if self.fail:
            raise TransferError("the link is down")


@pytest.fixture
def parts(checkpoint):
    """(tiering, engine, copier, tiers, hashes, pool) without a running engine."""
    server = Server(checkpoint, FAST)
    hashes = server.hashes(prompts(1)[0])
    engine, copier = StubEngine(hashes), GatedCopier(server.region)
    tiers = build_tiers(FAST, server.built.layout, clock=MonotonicClock())
    tiering = Tiering(tiers, copier, engine, config=replace(FAST, restore_timeout_s=0.2))
    return tiering, engine, copier, tiers, hashes, server


LOW = LoadReport(free_blocks=0, cached_blocks=10, total_blocks=24)


async def test_all_leases_are_given_back(parts):
    tiering, engine, copier, _, hashes, _ = parts
    tiering.start()
    tiering.on_load(LOW)
    await eventually(lambda: tiering.restorable(hashes) == 10)
    await eventually(lambda: not engine.leased)
    await tiering.stop()
    assert copier.is_closed


async def test_more_is_asked_of_an_engine_with_long_steps(parts):
    _, _, copier, tiers, hashes, _ = parts
    tiers.piece_blocks = 1
    engine = SlowEngine(hashes)
    pace = 100 * tiers.host.block_bytes
    tiering = Tiering(tiers, copier, engine, config=replace(FAST, save_bytes_per_second=pace))
    tiering.start()
    tiering.on_load(LOW)
    await eventually(lambda: len(engine.asked) >= 3)
    await tiering.stop()
    assert engine.asked[0] == 1
    assert engine.asked[1] >= 5, "a step's worth at the pace"
    assert not engine.leased


async def test_end_of_saving_gives_back_what_was_not_begun(parts):
    tiering, engine, copier, tiers, _, _ = parts
    tiers.piece_blocks = 1
    tiering._num_wanted = 10
    tiering.start()
    await eventually(lambda: tiering._is_usable)
    copier.gate.clear()
    tiering.on_load(LOW)
    await eventually(lambda: len(engine.leased) == 10)
    stopping = asyncio.create_task(tiering.stop())
    await asyncio.sleep(0.05)
    copier.gate.set()
    await stopping
    assert not engine.leased
    assert len(tiers.host) == 1


async def test_hanging_drive_holds_up_no_blocks_of_the_pool(parts, tmp_path, monkeypatch):
    _, engine, copier, _, hashes, server = parts
    monkeypatch.setattr(tiering_module, "JOIN_TIMEOUT_S", 0.1)
    config = replace(FAST, disk_bytes=MIB * 64, disk_path=tmp_path, flush_timeout_s=0.0)
    tiers = build_tiers(config, server.built.layout, clock=MonotonicClock())
    gate = threading.Event()
    monkeypatch.setattr(tiers.disk, "open", lambda: gate.wait(20) and False)
    tiering = Tiering(tiers, copier, engine, config=config)
    tiering.start()
    tiering.on_load(LOW)
    await eventually(lambda: tiering.restorable(hashes) == 10 and not engine.leased)
    assert await tiering.restore(hashes, [BlockId(i) for i in range(10)]) == 10
    await tiering.stop()
    assert not copier.is_closed, "the thread in the drive is left behind"
    gate.set()
    assert tiering._writer.join(5.0)


async def test_failed_copies_give_their_leases_back(parts, caplog):
    tiering, engine, copier, _, hashes, _ = parts
    tiering.start()
    await eventually(lambda: tiering._is_usable)
    copier.fail = True
    tiering.on_load(LOW)
    await eventually(lambda: "saving blocks failed" in caplog.text)
    assert not engine.leased
    assert tiering.restorable(hashes) == 0
    await tiering.stop()


async def test_memory_that_cannot_be_registered_leaves_the_worker_alone(parts, caplog):
    tiering, engine, copier, _, hashes, _ = parts
    copier.fail = True
    tiering.start()
    tiering.on_load(LOW)
    await eventually(lambda: "tiers are out of use" in caplog.text)
    assert tiering.restorable(hashes) == 0
    assert await tiering.restore(hashes[:1], [BlockId(0)]) == 0
    assert not engine.leased
    await tiering.stop()


async def test_stopped_engine_ends_saving(parts):
    tiering, engine, _, _, _, _ = parts
    engine.is_stopped = True
    tiering.start()
    tiering.on_load(LOW)
    await eventually(lambda: tiering._saving.done())
    await tiering.stop()


async def saved_and_held_up(parts):
    """All blocks saved; the next copy waits for the gate."""
    tiering, _, copier, tiers, hashes, _ = parts
    tiers.piece_blocks = 1
    tiering.start()
    tiering.on_load(LOW)
    await eventually(lambda: tiering.restorable(hashes) == 10)
    return tiering, copier, tiers, hashes


async def test_restore_that_takes_too_long_writes_nothing_later(parts, monkeypatch):
    tiering, copier, tiers, hashes = await saved_and_held_up(parts)
    pool = copier._real._blocks
    gate = threading.Event()
    real = tiers._pin_leading
    num_pinned = []

    def slow(piece):
        num_pinned.append(len(piece))
        if len(num_pinned) > 3:
            gate.wait(20)
        return real(piece)

    monkeypatch.setattr(tiers, "_pin_leading", slow)
    pool[10:20] = 0xEE
    block_ids = [BlockId(i) for i in range(10, 20)]
    assert await tiering.restore(hashes, block_ids) == 3
    assert tiering.restorable(hashes) == 0, "the reader hangs"
    assert await tiering.restore(hashes, block_ids) == 0
    gate.set()
    await eventually(lambda: tiering.restorable(hashes) == 10)
    assert (pool[13:20] == 0xEE).all()
    assert tiers.is_quiet
    await tiering.stop()


async def test_cancelled_restore_writes_nothing_later(parts, monkeypatch):
    tiering, copier, tiers, hashes = await saved_and_held_up(parts)
    pool = copier._real._blocks
    gate = threading.Event()
    real = tiers._pin_leading
    monkeypatch.setattr(tiers, "_pin_leading", lambda piece: gate.wait(20) and real(piece))
    pool[10:20] = 0xEE
    restoring = asyncio.create_task(tiering.restore(hashes, [BlockId(i) for i in range(10, 20)]))
    await asyncio.sleep(0.05)
    restoring.cancel()
    with pytest.raises(asyncio.CancelledError):
        await restoring
    gate.set()
    await tiering.stop()
    assert (pool[10:20] == 0xEE).all()
    assert tiers.is_quiet


async def test_restore_into_blocks_that_do_not_exist_ends_cleanly(parts):
    tiering, _, tiers, hashes = await saved_and_held_up(parts)
    assert await tiering.restore(hashes[:2], [BlockId(0), BlockId(10_000)]) == 1
    with pytest.raises(InternalError):
        await tiering.restore(hashes[:2], [BlockId(0)])
    assert tiers.is_quiet
    await tiering.stop()
    assert await tiering.restore(hashes[:1], [BlockId(0)]) == 0


async def test_copy_that_hangs_at_the_end_keeps_its_leases(parts, monkeypatch):
    """Blocks that are still being copied are not given back: they could be written again."""
    monkeypatch.setattr(tiering_module, "JOIN_TIMEOUT_S", 0.1)
    tiering, engine, copier, tiers, _, _ = parts
    tiering._config = replace(FAST, flush_timeout_s=0.0)
    tiering.start()
    await eventually(lambda: tiering._is_usable)
    copier.gate.clear()
    tiering.on_load(LOW)
    await eventually(lambda: bool(engine.leased))
    await tiering.stop()
    assert engine.leased
    assert not copier.is_closed
    copier.gate.set()
    assert tiering._saver.join(5.0)
    assert tiers.is_quiet


async def test_stop_without_start_is_harmless(parts):
    tiering, _, _, _, _, _ = parts
    await tiering.stop()


def test_tiers_over_a_pool_per_rank_are_refused(parts):
    _, engine, _, _, _, server = parts
    region = replace(server.region, tp_size=2)
    with pytest.raises(ConfigError, match=r"each of 2 ranks has a KV pool"):
        build_tiering(FAST, region, engine)
    assert build_tiering(TierConfig(), region, engine) is None
