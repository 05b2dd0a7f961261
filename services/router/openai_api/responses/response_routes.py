"""POST /v1/responses; GET and DELETE /v1/responses/{id}; POST /v1/responses/{id}/cancel."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

import orjson

from baton.core.clock import MonotonicClock
from baton.core.errors import BatonError, InvalidRequest, NotFound, Overloaded
from services.router.edge.preprocess import new_id, shorten
from services.router.openai_api.as_chat import renamed
from services.router.openai_api.blocks import Block
from services.router.openai_api.exchange import Exchange
from services.router.openai_api.handlers import GenerationRoutes
from services.router.openai_api.responses.conversation import (
    NAMES,
    Message,
    as_chat,
    input_messages,
    output_messages,
)
from services.router.openai_api.responses.envelope import Envelope, Object, Status
from services.router.openai_api.responses.response_format import ResponsesFormat
from services.router.openai_api.responses.response_schema import (
    ResponsesBody,
    check_response,
)
from services.router.openai_api.responses.store import ResponseStore, Stored
from services.router.openai_api.sampling import chat_plan
from services.router.openai_api.schema import parse_body
from services.router.openai_api.serving import Job
from services.router.tenants.tenants import Caller

logger = logging.getLogger(__name__)

ROUTE = "/v1/responses"
_CANCEL = "/cancel"

Handler = Callable[[Exchange], Awaitable[None]]


class ResponseRoutes:
    """Answers are kept by the copy that made them, which another copy cannot fetch."""

    def __init__(self, chat: GenerationRoutes) -> None:
        """`chat`: whose jobs they are."""
        self._chat = chat
        self._config = chat.config.responses
        self._store = ResponseStore(self._config)
        self._clock = MonotonicClock()
        self._background: dict[str, asyncio.Task[None]] = {}
        """By response."""

    def methods(self, path: str) -> Mapping[str, Handler] | None:
        """None: no route of these."""
        if path == ROUTE:
            return {"POST": self._create}
        response_id = path.removeprefix(ROUTE + "/")
        if response_id == path:
            return None
        if "/" not in response_id:
            return {"GET": self._retrieve, "HEAD": self._retrieve, "DELETE": self._delete}
        if response_id.endswith(_CANCEL) and "/" not in response_id.removesuffix(_CANCEL):
            return {"POST": self._cancel}
        return None

    async def _create(self, exchange: Exchange) -> None:
        caller = await self._chat.caller(exchange)
        body = parse_body(await self._chat.read(exchange), ResponsesBody)
        check_response(body)
        messages = [*self._earlier(caller, body), *input_messages(body.input)]
        response_id = new_id("resp").replace("-", "_")
        call = self._chat.call(exchange, caller, response_id)
        with contextlib.ExitStack() as at_end:
            with renamed(NAMES):
                chat = as_chat(body, messages)
                job = await self._chat.jobs.chat(
                    chat, call, lambda card: chat_plan(card, chat), at_end
                )
            envelope = Envelope(job.frame, body, job.inputs[0].sampling)

            def keep(response: Object, blocks: Sequence[Block] | None) -> None:
                if body.is_stored:
                    answer = None if blocks is None else output_messages(blocks)
                    self._keep(caller, response, answer and [*messages, *answer])

            wire = ResponsesFormat(envelope, time.time, keep)
            if not body.background:
                await self._chat.serving.run(job, exchange, wire)
                return
            await self._start(exchange, caller, job, envelope, wire, at_end)

    async def _start(
        self,
        exchange: Exchange,
        caller: Caller,
        job: Job,
        envelope: Envelope,
        wire: ResponsesFormat,
        at_end: contextlib.ExitStack,
    ) -> None:
        """In the background."""
        if len(self._background) >= self._config.max_background:
            raise Overloaded(
                f"{len(self._background)} responses run in the background, at most "
                f"{self._config.max_background} may; try again when one has ended"
            )
        response_id = job.frame.response_id
        response = envelope.response(Status.IN_PROGRESS)
        self._keep(caller, response, None)
        held = at_end.pop_all()
        task = asyncio.create_task(self._run(job, wire))
        self._background[response_id] = task
        # A task cancelled before its first step never reaches a clean-up of its own.
        task.add_done_callback(lambda _: held.close())
        task.add_done_callback(lambda _: self._background.pop(response_id, None))
        exchange.is_dispatched = True
        await exchange.answer_json(200, response)

    async def _run(self, job: Job, wire: ResponsesFormat) -> None:
        try:
            await self._chat.serving.collect(job, wire)
        except Exception as error:
            if not isinstance(error, BatonError):
                logger.exception("response %s failed", job.frame.response_id)
            wire.failed(error)

    async def _retrieve(self, exchange: Exchange) -> None:
        caller = await self._chat.caller(exchange)
        if b"stream=true" in exchange.query.lower():
            raise InvalidRequest(
                "stream: a stored response comes whole; leave stream out", param="stream"
            )
        stored = self._stored(caller, exchange.path.removeprefix(ROUTE + "/"))
        await exchange.answer(200, stored.body)

    async def _delete(self, exchange: Exchange) -> None:
        caller = await self._chat.caller(exchange)
        response_id = exchange.path.removeprefix(ROUTE + "/")
        self._stored(caller, response_id)
        await self._end(response_id)
        self._store.delete(caller.tenant, response_id, self._clock.now())
        await exchange.answer_json(200, {"id": response_id, "object": "response", "deleted": True})

    async def _cancel(self, exchange: Exchange) -> None:
        caller = await self._chat.caller(exchange)
        response_id = exchange.path.removeprefix(ROUTE + "/").removesuffix(_CANCEL)
        response = orjson.loads(self._stored(caller, response_id).body)
        if not response["background"]:
            raise InvalidRequest(
                f"response {shorten(response_id)} does not run in the background; to end one that "
                "a client waits for, close the connection",
                param="response_id",
            )
        await self._end(response_id)
        response = orjson.loads(self._stored(caller, response_id).body)
        if response["status"] == Status.IN_PROGRESS.value:
            response["status"] = Status.CANCELLED.value
            self._keep(caller, response, None)
        await exchange.answer_json(200, response)

    async def _end(self, response_id: str) -> None:
        """Of a response that may run in the background; its workers are told before this ends."""
        task = self._background.get(response_id)
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    def _earlier(self, caller: Caller, body: ResponsesBody) -> list[Message]:
        """The conversation so far."""
        previous = body.previous_response_id
        if previous is None:
            return []
        stored = self._store.get(caller.tenant, previous, self._clock.now())
        if stored is None:
            raise NotFound(
                f"previous_response_id: {_not_there(previous)}", param="previous_response_id"
            )
        if stored.messages is None:
            raise InvalidRequest(
                f"previous_response_id: response {shorten(previous)} has no answer to go on from",
                param="previous_response_id",
            )
        messages: list[Message] = orjson.loads(stored.messages)
        return messages

    def _stored(self, caller: Caller, response_id: str) -> Stored:
        stored = self._store.get(caller.tenant, response_id, self._clock.now())
        if stored is None:
            raise NotFound(_not_there(response_id), param="response_id")
        return stored

    def _keep(self, caller: Caller, response: Object, messages: Sequence[Message] | None) -> None:
        stored = Stored(
            orjson.dumps(response), None if messages is None else orjson.dumps(list(messages))
        )
        self._store.put(caller.tenant, str(response["id"]), stored, self._clock.now())


def _not_there(response_id: str) -> str:
    return (
        f"there is no response {shorten(response_id)} here; it was not stored, has expired, or is "
        "kept by another copy of the router"
    )
