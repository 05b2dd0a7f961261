"""Defaults of the prefill pool, laid over the worker's own."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "role": "prefill",
        # Few prompts at a time: each ends sooner, and more of them would share the same step
        # budget without computing more tokens per second.
        "engine": {"max_num_seqs": 8, "max_num_batched_tokens": 512},
    }
)
