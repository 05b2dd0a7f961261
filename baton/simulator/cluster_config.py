"""What is simulated: workers, their sizes and pace, router copies, policies."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.simulator.hardware import Hardware
from services.router.admission.admission_config import AdmissionConfig
from services.router.placement.policy_config import PolicyConfig


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """What is simulated."""

    num_prefill: int = 8
    num_decode: int = 8
    num_blocks: int = 4000
    """Of each worker's pool."""
    num_decode_blocks: int | None = None
    """Of a decode worker's; None: as many."""
    block_size: int = 512
    num_layers: int = 80
    """With the next two, how much KV a token has: by default a model of 70 billion parameters."""
    num_kv_heads: int = 8
    head_dim: int = 128
    max_model_len: int = 1 << 18
    prefill_max_num_seqs: int = 64
    prefill_max_num_batched_tokens: int = 8192
    decode_max_num_seqs: int = 256
    decode_max_num_batched_tokens: int = 2048
    num_routers: int = 1
    """Copies; requests are dealt to them at random."""
    hardware: Hardware = field(default_factory=Hardware)
    decode_hardware: Hardware | None = None
    """Of decode workers; None: the same. Links are those of `hardware`."""
    workers_per_host: int = 1
    """That share its cores, in order of their numbers: see `Hardware.neighbour_share`."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    admission: AdmissionConfig | None = None
    """None admits everybody at once."""
    max_concurrent: int | None = None
    """A fixed number of requests at a time for each router copy, the others refused: what
    admission is compared with."""
    seed: int = 0
