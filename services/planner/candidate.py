"""A way to use some devices, and the simulated cluster it stands for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from baton.simulator.cluster_config import ClusterConfig
from baton.simulator.hardware import Hardware
from services.planner.pool_model import PoolModel
from services.router.placement.policy_config import PolicyConfig

NO_TIME = Hardware(
    step_fixed_s=1e-6,
    prefill_token_s=0.0,
    prefill_pair_s=0.0,
    decode_sequence_s=0.0,
    decode_kv_token_s=0.0,
)
"""The other pool, when one is looked at alone."""
MAX_NUM_SEQS = 1024


@dataclass(frozen=True, slots=True)
class Pool:
    """`num_workers` alike."""

    model: PoolModel
    num_workers: int

    @property
    def num_devices(self) -> int:
        return self.num_workers * self.model.tensor_parallel

    def __str__(self) -> str:
        return f"{self.num_workers} x tp{self.model.tensor_parallel}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """Prefill and decode pools, or one pool that does both (`prefill` None)."""

    prefill: Pool | None
    decode: Pool
    max_step_tokens: int
    """Of prompts, in one step of who computes them: a colocated worker cuts prompts into chunks
    of that many tokens, so that its running sequences wait no longer than for one."""
    is_chunked: bool = True

    @property
    def num_devices(self) -> int:
        return self.decode.num_devices + (self.prefill.num_devices if self.prefill else 0)

    @property
    def name(self) -> str:
        if self.prefill is not None:
            return f"{self.prefill} prefill + {self.decode} decode"
        how = f"chunks of {self.max_step_tokens}" if self.is_chunked else "whole prompts"
        return f"{self.decode} colocated, {how}"


@dataclass(frozen=True, slots=True)
class Layout:
    """How KV is kept; of the model, not of a candidate."""

    block_size: int
    kv_bytes_per_token: int
    max_model_len: int


def cluster_of(
    candidate: Candidate, layout: Layout, seed: int, policy: PolicyConfig | None = None
) -> ClusterConfig:
    """What the simulator is to run."""
    prefill = candidate.prefill
    decode = candidate.decode
    base = ClusterConfig(
        num_prefill=prefill.num_workers if prefill else 0,
        num_decode=decode.num_workers,
        num_blocks=_num_blocks(prefill.model if prefill else decode.model, layout),
        num_decode_blocks=_num_blocks(decode.model, layout),
        block_size=layout.block_size,
        # One layer with one head of as many numbers of 2 bytes, K and V, as all of them have.
        num_layers=1,
        num_kv_heads=1,
        head_dim=max(1, layout.kv_bytes_per_token // 4),
        max_model_len=layout.max_model_len,
        prefill_max_num_batched_tokens=candidate.max_step_tokens,
        decode_max_num_batched_tokens=max(2048, candidate.max_step_tokens),
        prefill_max_num_seqs=min(MAX_NUM_SEQS, candidate.max_step_tokens),
        decode_max_num_seqs=MAX_NUM_SEQS,
        hardware=prefill.model.hardware if prefill else decode.model.hardware,
        decode_hardware=decode.model.hardware,
        policy=policy or PolicyConfig(),
        seed=seed,
    )
    if prefill is not None:
        return base
    return dataclasses.replace(
        base,
        decode_max_num_batched_tokens=candidate.max_step_tokens,
        decode_max_num_seqs=min(MAX_NUM_SEQS, candidate.max_step_tokens),
    )


def alone(pool: Pool, *, is_prefill: bool, max_step_tokens: int) -> Candidate:
    """`pool` beside another one that takes no time."""
    free = Pool(dataclasses.replace(pool.model, hardware=NO_TIME), pool.num_workers)
    prefill, decode = (pool, free) if is_prefill else (free, pool)
    return Candidate(prefill, decode, max_step_tokens)


def _num_blocks(model: PoolModel, layout: Layout) -> int:
    return max(2, model.max_kv_tokens // layout.block_size)
