"""Keeps this worker in the registry while it serves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from baton.core.errors import BatonError
from baton.core.worker_info import WorkerInfo
from baton.registry.registry import Registry

logger = logging.getLogger(__name__)

RENEWALS_PER_TTL = 4
"""Two renewals may be late without the worker vanishing."""
RETRY_S = 0.5


async def keep_registered(
    registry: Registry,
    describe: Callable[[], WorkerInfo],
    *,
    ttl_s: float,
    tell: Callable[[bool], None] = lambda is_registered: None,
) -> None:
    """Register and renew until cancelled, then leave and close the registry. One that fails is
    tried again; the first failure in a row is logged. `describe` says who the worker is now; of its
    answers only the role may change. `tell` hears after each attempt whether the worker is
    registered."""
    is_registered = is_failing = False
    registered = info = describe()
    try:
        while True:
            info = describe()
            try:
                if not is_registered or registered != info:
                    await registry.register(info, ttl_s=ttl_s)
                    is_registered, registered = True, info
                else:
                    is_registered = await registry.renew(info.worker_id, info.epoch)
            except BatonError as error:
                if not is_failing:
                    logger.warning("registration failed, trying again: %s", error)
                is_registered, is_failing = False, True
            else:
                is_failing = False
            tell(is_registered)
            await asyncio.sleep(ttl_s / RENEWALS_PER_TTL if is_registered else RETRY_S)
    finally:
        try:
            await registry.deregister(info.worker_id, info.epoch)
        except BatonError as error:
            logger.warning("could not leave the registry, the lease will end: %s", error)
        await registry.close()
