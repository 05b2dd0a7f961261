"""An FP8 KV pool on a CPU: rounding, scales, and every road to a token giving the same one."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_llama
from baton.core.block import BlockId, chain_hashes, root_hash
from baton.core.clock import ManualClock
from baton.core.errors import ConfigError
from baton.core.kv_layout import KvLayout
from baton.core.request import GenerateRequest, PeerRef, RequestId, SamplingParams, Work
from baton.core.worker_info import Epoch, WorkerId
from baton.engine.config import EngineConfig
from baton.engine.engine import Engine, StepOutput
from baton.engine.kv_cache import KvPool, KvScales
from baton.engine.layers.linear import Linear
from baton.engine.model_runner import ModelRunner
from baton.engine.parallel import Parallel
from baton.engine.weights import LoadedModel, load_model
from model_harness import ModelHarness

CPU = torch.device("cpu")
PEER = PeerRef(WorkerId("prefill-0"), Epoch("e"), "127.0.0.1:1")
BLOCK_SIZE = 4
FP8 = "float8_e4m3fn"


def make_layout(dtype: str = FP8, num_kv_heads: int = 2) -> KvLayout:
    return KvLayout(
        model_id="m",
        num_layers=3,
        num_kv_heads=num_kv_heads,
        head_dim=8,
        block_size=BLOCK_SIZE,
        dtype=dtype,
    )


def make_scales(num_kv_heads: int = 2, dtype: torch.dtype = torch.float32) -> KvScales:
    k = 0.25 + torch.arange(3.0 * num_kv_heads).view(3, num_kv_heads)
    return KvScales(k, 0.01 * k, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathered_is_written_to_within_e4m3(dtype: torch.dtype) -> None:
    scales = make_scales(dtype=dtype)
    pool = KvPool(make_layout(), 6, device=CPU, scales=scales)
    table = np.array([[4, 1], [0, 5]], dtype=np.int64)
    positions = np.tile(np.arange(8), 2)
    slots = pool.slot_rows(table.repeat(BLOCK_SIZE, axis=1).reshape(-1), positions % BLOCK_SIZE)
    rows = pool.gather_rows(table)
    generator = torch.Generator().manual_seed(0)
    for layer in range(3):
        factor = torch.cat((scales.k[layer], scales.v[layer])).view(1, -1, 1)
        written = (torch.randn(16, 4, 8, generator=generator) * 50 * factor).to(dtype)
        pool.write(slots[layer], written, layer)
        keys, values = pool.gather(rows[layer], 2, layer)
        assert keys.dtype is values.dtype is dtype
        expected = written.view(2, 8, 2, 2, 8).permute(2, 0, 3, 1, 4).reshape(2, 4, 8, 8)
        # Half of a step: 2^-4 of a number, plus half a step of bfloat16 where it is used.
        for got, want in ((keys, expected[0]), (values, expected[1])):
            torch.testing.assert_close(got.float(), want.float(), rtol=0.07, atol=1e-3)


def test_pool_holds_the_numbers_before_scaling() -> None:
    pool = KvPool(make_layout(), 2, device=CPU, scales=make_scales())
    slots = pool.slot_rows(np.array([1]), np.array([2]))
    pool.write(slots[1], torch.full((1, 4, 8), 4.5), 1)
    assert pool.blocks.dtype is torch.float8_e4m3fn
    assert (pool.blocks[1, 0, 1, 0, 2].float() == 2.0).all()  # 4.5 / 2.25
    assert (pool.blocks[1, 1, 1, 1, 2].float() == 144.0).all()  # 4.5 / 0.0325, rounded


def test_what_exceeds_the_range_is_clipped() -> None:
    pool = KvPool(make_layout(), 1, device=CPU, scales=make_scales())
    slots = pool.slot_rows(np.array([0]), np.array([0]))
    pool.write(slots[0], torch.full((1, 4, 8), -1e6), 0)
    keys, _ = pool.gather(pool.gather_rows(np.array([[0]]))[0], 1, 0)
    assert (keys[0, 0] == -448 * 0.25).all()


def test_ranks_use_the_scales_of_their_own_heads() -> None:
    scales = make_scales(num_kv_heads=4)
    memory = memoryview(bytearray(make_layout(num_kv_heads=4).block_bytes))
    for rank in range(2):
        part = slice(2 * rank, 2 * rank + 2)
        pool = KvPool(
            make_layout(num_kv_heads=4),
            1,
            memory=memory,
            device=CPU,
            parallel=Parallel(rank, 2),
            scales=KvScales(scales.k[:, part], scales.v[:, part], torch.float32),
        )
        slots = pool.slot_rows(np.array([0]), np.array([0]))
        pool.write(slots[0], torch.full((1, 4, 8), 8.0), 0)
        keys, _ = pool.gather(pool.gather_rows(np.array([[0]]))[0], 1, 0)
        torch.testing.assert_close(keys[:, 0], torch.full((2, 8), 8.0), rtol=0.07, atol=0)


def test_scales_belong_to_fp8_pools_alone() -> None:
    with pytest.raises(ConfigError, match="needs scales"):
        KvPool(make_layout(), 1, device=CPU)
    with pytest.raises(ConfigError, match="takes no scales"):
        KvPool(make_layout("float32"), 1, device=CPU, scales=make_scales())


def test_layouts_of_other_types_do_not_match() -> None:
    fp8, bf16 = make_layout(), make_layout("bfloat16")
    assert fp8.block_bytes * 2 == bf16.block_bytes
    assert fp8.fingerprint != bf16.fingerprint
    assert fp8.difference(bf16) == "dtype: float8_e4m3fn here, bfloat16 there"


class Worker:
    """An engine over memory of its own, and the tokens it has emitted."""

    def __init__(self, model: LoadedModel[Linear], num_blocks: int = 64) -> None:
        config = EngineConfig(
            model_path=Path("."), dtype="float32", block_size=BLOCK_SIZE, kv_cache_dtype="fp8"
        )
        self.layout = model.layout(BLOCK_SIZE)
        self.memory = mmap.mmap(-1, num_blocks * self.layout.block_bytes)
        self.engine = Engine(
            config=config,
            layout=self.layout,
            num_blocks=num_blocks,
            max_model_len=model.max_model_len,
            runner=ModelRunner(model, config, self.layout, num_blocks, memoryview(self.memory)),
            clock=ManualClock(),
            vocab_size=model.model_config.vocab_size,
        )
        self.tokens: dict[str, list[int]] = {}
        self.num_cached = 0

    def submit(self, name: str, prompt: tuple[int, ...], work: Work = Work.GENERATE) -> None:
        root = root_hash(self.layout.fingerprint)
        self.engine.submit(
            GenerateRequest(
                RequestId(name),
                work,
                prompt,
                SamplingParams(max_tokens=12, temperature=0.0),
                block_hashes=tuple(chain_hashes(root, prompt, BLOCK_SIZE)),
                kv_source=PEER if work is Work.DECODE else None,
            )
        )

    def step(self) -> StepOutput:
        output = self.engine.step()
        for delta in output.deltas:
            assert not delta.error
            self.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            self.num_cached = delta.num_cached_tokens
        return output

    def run(self) -> dict[str, list[int]]:
        while self.engine.has_work:
            self.step()
        return self.tokens

    def block(self, block_id: BlockId) -> slice:
        size = self.layout.block_bytes
        return slice(block_id * size, (block_id + 1) * size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write_checkpoint(tmp_path_factory.mktemp("m") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel[Linear]:
    config = EngineConfig(model_path=folder, dtype="float32", kv_cache_dtype="fp8")
    return load_model(config)


PROMPTS = {f"r{n}": tuple((7 * n + i * i) % 320 for i in range(n)) for n in (5, 18, 31, 44)}


def test_prefix_hits_and_batches_give_the_same_tokens(model: LoadedModel[Linear]) -> None:
    """Chunks read back what was rounded, so what was cached and what is fresh are the same."""
    assert model.layout(BLOCK_SIZE).dtype == FP8
    alone = {}
    for name, prompt in PROMPTS.items():
        worker = Worker(model)
        worker.submit(name, prompt)
        alone |= worker.run()
    together = Worker(model)
    for name, prompt in PROMPTS.items():
        together.submit(name, prompt)
    assert together.run() == alone
    for name, prompt in PROMPTS.items():
        together.submit(f"{name} again", prompt)
    again = together.run()
    assert {name: again[f"{name} again"] for name in PROMPTS} == alone
    assert together.num_cached > 0
    assert together.engine.is_empty


def test_hand_off_moves_bytes_and_gives_the_same_tokens(model: LoadedModel[Linear]) -> None:
    colocated = Worker(model)
    prefill, decode = Worker(model), Worker(model, num_blocks=50)
    for name, prompt in PROMPTS.items():
        colocated.submit(name, prompt)
        prefill.submit(name, prompt, Work.PREFILL)
        decode.submit(name, prompt, Work.DECODE)
    targets: dict[str, list[BlockId]] = {}
    while decode.engine.has_work or prefill.engine.has_work:
        for reservation in decode.step().reservations:
            targets[reservation.request_id] = list(reservation.block_ids)
        for chunk in prefill.step().chunks:
            own = targets[chunk.request_id][chunk.first_block_index :]
            for source, target in zip(chunk.block_ids, own, strict=False):
                decode.memory[decode.block(target)] = prefill.memory[prefill.block(source)]
            if chunk.is_last:
                assert chunk.first_token is not None
                decode.tokens[chunk.request_id] = list(prefill.tokens[chunk.request_id])
                decode.engine.activate(chunk.request_id, chunk.first_token)
                prefill.engine.release_lease(chunk.request_id)
    assert decode.tokens == colocated.run()
    assert prefill.engine.is_empty and decode.engine.is_empty


def test_logits_stay_near_those_of_an_exact_pool(
    folder: Path, model: LoadedModel[Linear], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = ModelHarness(folder, block_size=BLOCK_SIZE)
    fp8 = ModelHarness(folder, block_size=BLOCK_SIZE)
    fp8.pool = KvPool(model.layout(BLOCK_SIZE), 64, device=CPU, scales=model.pool_scales())
    fp8.model._pool = fp8.model._attention._pool = fp8.pool
    logits: list[Any] = []
    for harness in (exact, fp8):
        sequence = harness.sequence(PROMPTS["r44"], room=4)
        logits += harness.logits((sequence, 44))
    # Logits are of order one; keys and values are off by 2.5 % of their size on average.
    torch.testing.assert_close(logits[1], logits[0], atol=0.15, rtol=0)
    assert not torch.equal(logits[1], logits[0])
