"""Keeps this worker in the registry while it serves."""

from __future__ import annotations

import asyncio
import logging

from baton.core.errors import BatonError
from baton.core.worker_info import WorkerInfo
from baton.registry.registry import Registry

logger = logging.getLogger(__name__)

RENEWALS_PER_TTL = 4
"""Two renewals may be late without the worker vanishing."""
RETRY_S = 0.5


async def keep_registered(registry: Registry, info: WorkerInfo, *, ttl_s: float) -> None:
    """Register and renew until cancelled, then leave. A registry that fails is tried again."""
    is_registered = False
    try:
        while True:
            try:
                if not is_registered:
                    await registry.register(info, ttl_s=ttl_s)
                    is_registered = True
                else:
                    is_registered = await registry.renew(info.worker_id, info.epoch)
            except BatonError as error:
                logger.warning("registration failed, trying again: %s", error)
                is_registered = False
            await asyncio.sleep(ttl_s / RENEWALS_PER_TTL if is_registered else RETRY_S)
    finally:
        await registry.deregister(info.worker_id, info.epoch)
