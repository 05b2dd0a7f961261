"""Defaults of the decode pool, laid over the worker's own."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "role": "decode",
        # A local prefill shares its step with running decodes; small chunks keep the gap between
        # their tokens short.
        "engine": {"max_num_seqs": 32, "max_num_batched_tokens": 128},
    }
)
