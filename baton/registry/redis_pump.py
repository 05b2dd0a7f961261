"""Commands of many tasks over one connection to Redis, in their order and in batches.

    call() ──► queue ──► what has come meanwhile goes out as one message ──► answers

A caller that gives up takes nothing down with it: the connection is used by the pump's own task
alone. A command that nobody waits for any more is not sent, or its answer dropped.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, ResponseError

from baton.core.errors import Unavailable
from baton.registry.redis_connection import CALL_TIMEOUT_S, redis_failure

logger = logging.getLogger(__name__)

Argument = str | bytes | int

MAX_QUEUE = 20_000
COMMANDS_PER_BATCH = 128
CLOSE_TIMEOUT_S = 2 * CALL_TIMEOUT_S


GUARDED_CALL = """
local garbage = ''
local function text(value) return string.format('%.17g', value) end
local function call(key, ...)
  -- A key of another type is thrown away, and the call made again.
  local reply = redis.pcall(...)
  if type(reply) == 'table' and reply.err then
    garbage = key .. ': ' .. reply.err
    redis.call('DEL', key)
    return redis.call(...)
  end
  return reply
end
"""
"""Lua that scripts begin with: `call(key, ...)` survives what others have put at its key and leaves
it in `garbage`; `text` writes numbers so that nothing of them is lost."""


@dataclass(frozen=True, slots=True)
class Script:
    """Lua, known to Redis by its hash."""

    source: str
    sha: str

    @classmethod
    def of(cls, source: str) -> Script:
        return cls(source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


@dataclass(slots=True)
class _Call:
    what: str
    command: tuple[Argument, ...]
    answer: asyncio.Future[Any]
    script: Script | None = None


class RedisPump:
    """One event loop; starts with the first call, ends with `close`."""

    def __init__(self, client: Redis) -> None:
        """`client` stays the caller's to close."""
        self._client = client
        self._queue: deque[_Call] = deque()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    async def call(self, what: str, *command: Argument) -> Any:
        """The answer to `command`. Raises Unavailable, saying that `what` failed; a ResponseError
        of Redis as it is."""
        return await self._enqueue(_Call(what, command, _future()))

    async def run(
        self, what: str, script: Script, keys: Sequence[str], args: Sequence[Argument]
    ) -> Any:
        """The answer of `script`. Raises as `call`."""
        command = ("EVALSHA", script.sha, len(keys), *keys, *args)
        return await self._enqueue(_Call(what, command, _future(), script))

    async def close(self) -> None:
        """What waits fails; what is on its way is waited for."""
        self._is_closed = True
        self._wake.set()
        if self._task is not None:
            done, _ = await asyncio.wait([self._task], timeout=CLOSE_TIMEOUT_S)
            if not done:
                self._task.cancel()
                await asyncio.wait([self._task])
        _fail(self._queue, "the connection is closed")
        self._queue.clear()

    def _enqueue(self, call: _Call) -> asyncio.Future[Any]:
        if self._is_closed:
            raise Unavailable(f"{call.what}: the connection is closed")
        if len(self._queue) >= MAX_QUEUE:
            raise Unavailable(f"{call.what}: {MAX_QUEUE} commands wait for Redis already")
        if self._task is None:
            self._task = asyncio.create_task(self._pump(), name="redis pump")
        self._queue.append(call)
        self._wake.set()
        return call.answer

    async def _pump(self) -> None:
        while not self._is_closed:
            await self._wake.wait()
            self._wake.clear()
            while self._queue and not self._is_closed:
                batch = self._next_batch()
                try:
                    await self._send(batch)
                except Exception as error:
                    reason = redis_failure(error)
                    if reason is None:
                        logger.exception("sending commands to Redis failed unexpectedly")
                    _fail(batch, reason or f"{type(error).__name__}: {error}")

    def _next_batch(self) -> list[_Call]:
        batch: list[_Call] = []
        while self._queue and len(batch) < COMMANDS_PER_BATCH:
            call = self._queue.popleft()
            if not call.answer.done():
                batch.append(call)
        return batch

    async def _send(self, batch: list[_Call]) -> None:
        unknown: dict[str, list[_Call]] = {}
        for call, answer in zip(batch, await self._execute(batch), strict=True):
            if isinstance(answer, NoScriptError) and call.script is not None:
                unknown.setdefault(call.script.source, []).append(call)
            else:
                _settle(call, answer)
        # A Redis that has just started: these did nothing yet.
        for source, calls in unknown.items():
            await self._client.script_load(source)
            for call, answer in zip(calls, await self._execute(calls), strict=True):
                _settle(call, answer)

    async def _execute(self, batch: list[_Call]) -> list[Any]:
        if not batch:
            return []
        async with self._client.pipeline(transaction=False) as pipeline:
            for call in batch:
                pipeline.execute_command(*call.command)
            answers: list[Any] = await pipeline.execute(raise_on_error=False)
            return answers


def _future() -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()


def _settle(call: _Call, answer: Any) -> None:
    if call.answer.done():
        return
    if isinstance(answer, ResponseError):
        call.answer.set_exception(answer)
    elif isinstance(answer, Exception):
        call.answer.set_exception(Unavailable(f"{call.what}: {answer}"))
    else:
        call.answer.set_result(answer)


def _fail(calls: Sequence[_Call] | deque[_Call], reason: str) -> None:
    for call in calls:
        if not call.answer.done():
            call.answer.set_exception(Unavailable(f"{call.what}: {reason}"))
