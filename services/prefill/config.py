"""Defaults of the prefill pool, laid over the worker's own."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from baton.core.worker_info import Role
from services.worker.pool_limits import POOL_LIMITS

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {"role": Role.PREFILL.value, "engine": POOL_LIMITS[Role.PREFILL]}
)
