"""What the two pools do differently with one engine: the limits of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from baton.core.worker_info import Role

POOL_LIMITS: Mapping[Role, Mapping[str, int]] = MappingProxyType(
    {
        # Few prompts at a time: each ends sooner, and more of them would share the same step
        # budget without computing more tokens per second.
        Role.PREFILL: MappingProxyType({"max_num_seqs": 8, "max_num_batched_tokens": 512}),
        # A local prefill shares its step with running decodes; small chunks keep the gap between
        # their tokens short.
        Role.DECODE: MappingProxyType({"max_num_seqs": 32, "max_num_batched_tokens": 128}),
    }
)
"""Fields of EngineConfig that a pool sets unless its settings do."""
