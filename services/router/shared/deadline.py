"""Deadlines of calls to the store."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from baton.core.errors import Unavailable

STORE_TIMEOUT_S = 1.0
"""Of calls that no request waits for."""


@contextlib.asynccontextmanager
async def within(timeout_s: float, what: str) -> AsyncIterator[None]:
    """Raises Unavailable, saying that `what` did not come to an end in time."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise Unavailable(f"{what}: no answer within {timeout_s:g} s") from error
