"""The workers of a simulation, and what routers know of the links between them.

Does not know: what they are given to do.
"""

from __future__ import annotations

import dataclasses

from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Role
from baton.simulator.cluster_config import ClusterConfig
from baton.simulator.events import EventQueue
from baton.simulator.hardware import Hardware
from baton.simulator.worker import SimWorker, WorkerListener
from services.router.placement.policy_config import PolicyConfig


def build_workers(
    config: ClusterConfig, events: EventQueue, *, listener: WorkerListener
) -> list[SimWorker]:
    """Prefill workers first, all of one KV layout."""
    names = [(f"p{i}", Role.PREFILL) for i in range(config.num_prefill)]
    names += [(f"d{i}", Role.DECODE) for i in range(config.num_decode)]
    return [build_worker(name, role, config, events, listener=listener) for name, role in names]


def with_links_of(hardware: Hardware, policy: PolicyConfig) -> PolicyConfig:
    """What routers assume of links nobody has measured is what these links are: all of them are
    alike, and a report from each worker of its link to every other one would say no more."""
    return dataclasses.replace(
        policy,
        link_bytes_per_second=hardware.link_bytes_per_second,
        link_latency_s=hardware.link_latency_s,
    )


def build_worker(
    name: str,
    role: Role,
    config: ClusterConfig,
    events: EventQueue,
    *,
    listener: WorkerListener,
) -> SimWorker:
    layout = KvLayout(
        "simulated", config.num_layers, config.num_kv_heads, config.head_dim, config.block_size,
        "bfloat16",
    )  # fmt: skip
    is_prefill = role is Role.PREFILL
    return SimWorker(
        name,
        role,
        layout=layout,
        num_blocks=(
            config.num_blocks if is_prefill else config.num_decode_blocks or config.num_blocks
        ),
        max_num_seqs=config.prefill_max_num_seqs if is_prefill else config.decode_max_num_seqs,
        max_num_batched_tokens=(
            config.prefill_max_num_batched_tokens
            if is_prefill
            else config.decode_max_num_batched_tokens
        ),
        max_model_len=config.max_model_len,
        hardware=(config.hardware if is_prefill else config.decode_hardware or config.hardware),
        events=events,
        listener=listener,
    )
