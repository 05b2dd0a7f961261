"""A worker that nobody has measured, for plans."""

from __future__ import annotations

from baton.simulator.hardware import Hardware
from services.planner.pool_model import PoolModel

HARDWARE = Hardware(
    step_fixed_s=0.02,
    prefill_token_s=150e-6,
    prefill_pair_s=1e-9,
    decode_sequence_s=0.4e-3,
    decode_kv_token_s=5e-7,
    link_bytes_per_second=2e11,
)
MODEL = PoolModel(1, HARDWARE, 50_000, 30.0, "made up")
