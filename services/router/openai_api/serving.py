"""Run the generations of one HTTP request and answer with a stream or one body.

    start all ─► first delta or error ─► 200 + chunks ... [DONE]     errors now go into the stream
                          └─► 4xx / 5xx while the status is still open

The client leaving cancels all generations at once, in either form of answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.core.errors import BatonError, InternalError, RequestCancelled
from baton.core.request import FinishReason, TokenLogprobs
from services.router.openai_api.exchange import Exchange, Receive
from services.router.openai_api.feed import Feed, Item, open_feed
from services.router.openai_api.wire_format import Choice, Frame, WireFormat
from services.router.requests.generation import GenerationDelta, GenerationInput, Generator, Usage
from services.router.requests.timing import RequestTiming

logger = logging.getLogger(__name__)

CLEANUP_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Job:
    """One HTTP request's generations. Input number i is choice `i % num_choices` of its prompt."""

    inputs: Sequence[GenerationInput]
    is_stream: bool
    frame: Frame


class Serving:
    """Runs jobs; knows which are running so that a stop of the process can end them."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._feeds: set[Feed] = set()

    @property
    def num_running(self) -> int:
        return len(self._feeds)

    def end_all(self, error: BatonError) -> None:
        """Cancel everything that runs; clients read `error`."""
        for feed in list(self._feeds):
            feed.fail(error)

    async def run(self, job: Job, exchange: Exchange, wire: WireFormat) -> None:
        """Answer the request. Raises RequestError or ServiceError while nothing has been sent."""
        exchange.is_dispatched = True
        feed = open_feed([self._generator.generate(request) for request in job.inputs])
        self._feeds.add(feed)
        watch = asyncio.create_task(_watch_client(exchange.receive, feed))
        try:
            if job.is_stream:
                await _stream(job, feed, exchange, wire)
            else:
                await exchange.answer(200, await _collect(job, feed, wire))
        finally:
            watch.cancel()
            self._feeds.discard(feed)
            await feed.aclose()

    async def collect(self, job: Job, wire: WireFormat) -> bytes:
        """The whole answer, for no client that waits: `end_all` ends it, or a cancellation."""
        feed = open_feed([self._generator.generate(request) for request in job.inputs])
        self._feeds.add(feed)
        try:
            return await _collect(job, feed, wire)
        finally:
            self._feeds.discard(feed)
            await feed.aclose()


async def _watch_client(receive: Receive, feed: Feed) -> None:
    """After the body, the only thing a client can do is leave."""
    while (await receive())["type"] != "http.disconnect":
        pass
    feed.fail(RequestCancelled("the client went away"))


@dataclass(slots=True)
class _Progress:
    """What has been seen of one choice."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    usage: Usage | None = None
    timing: RequestTiming | None = None
    is_open: bool = False
    """Its opening chunk has been written."""
    num_tokens: int = 0
    """Written so far; counted where clients want to know all the time."""


async def _collect(job: Job, feed: Feed, wire: WireFormat) -> bytes:
    progress = [_Progress() for _ in job.inputs]
    while items := await feed.take():
        for index, delta in items:
            choice = progress[index]
            choice.text.append(delta.text)
            choice.logprobs.extend(delta.logprobs)
            if job.frame.returns_token_ids:
                choice.token_ids.extend(delta.token_ids)
            choice.prompt_logprobs = delta.prompt_logprobs or choice.prompt_logprobs
            _note_end(choice, delta)
    choices = [
        Choice(
            index=i,
            text="".join(p.text),
            logprobs=p.logprobs,
            finish_reason=_finish_reason(p),
            stop_reason=p.stop_reason,
            timing=p.timing,
            token_ids=p.token_ids,
            prompt_logprobs=p.prompt_logprobs,
        )
        for i, p in enumerate(progress)
    ]
    return wire.answer(choices, _total_usage(job, progress))


async def _stream(job: Job, feed: Feed, exchange: Exchange, wire: WireFormat) -> None:
    progress = [_Progress() for _ in job.inputs]
    is_plain = job.frame.is_plain
    items = await feed.take()
    await exchange.start_stream()
    try:
        while True:
            data = b"".join(_chunks(job, wire, progress, items, is_plain=is_plain))
            # When every choice has ended, the last delta was the end of one.
            if items[-1].delta.finish_reason is not None and _have_ended(progress):
                break
            if data:
                await exchange.stream(data)
            items = await feed.take()
            if not items:
                raise InternalError("a generation ended without a finish reason")
        if job.frame.include_usage:
            data += wire.usage(_total_usage(job, progress))
        await exchange.stream(data + wire.end(), is_last=True)
        await feed.drain(CLEANUP_TIMEOUT_S)
    except Exception as error:
        if not isinstance(error, BatonError):
            logger.exception("a stream broke, request %s", exchange.request_id.decode())
        # To a client that has left this goes nowhere.
        with contextlib.suppress(OSError):
            await exchange.stream(wire.error(error), is_last=True)


def _chunks(
    job: Job,
    wire: WireFormat,
    progress: list[_Progress],
    items: Sequence[Item],
    *,
    is_plain: bool,
) -> list[bytes]:
    """The events for these deltas, one event each: clients count events as tokens."""
    events = []
    usage = None
    for index, delta in items:
        choice = progress[index]
        if not choice.is_open:
            choice.is_open = True
            if job.frame.continuous_usage:
                usage = _usage_so_far(job, index, choice)
            events.append(wire.opening(index, delta, usage))
        if is_plain:
            if delta.text:
                events.append(wire.text(index, delta.text))
        else:
            choice.num_tokens += len(delta.token_ids)
            if job.frame.continuous_usage:
                usage = _usage_so_far(job, index, choice)
            if delta.text or delta.token_ids:
                events.append(wire.detailed(index, delta, usage))
        if delta.finish_reason is not None:
            _note_end(choice, delta)
            events.append(wire.finish(index, delta, usage))
    return events


def _usage_so_far(job: Job, index: int, choice: _Progress) -> Usage:
    return Usage(len(job.inputs[index].prompt_token_ids), choice.num_tokens, 0)


def _have_ended(progress: Sequence[_Progress]) -> bool:
    return all(choice.finish_reason is not None for choice in progress)


def _note_end(choice: _Progress, delta: GenerationDelta) -> None:
    if delta.finish_reason is not None:
        choice.finish_reason = delta.finish_reason
        choice.stop_reason = delta.stop_reason
        choice.usage = delta.usage
        choice.timing = delta.timing


def _finish_reason(choice: _Progress) -> FinishReason:
    if choice.finish_reason is None:
        raise InternalError("a generation ended without a finish reason")
    return choice.finish_reason


def _total_usage(job: Job, progress: Sequence[_Progress]) -> Usage:
    """Each prompt counts once, however many choices it has; every choice's output counts."""
    usages = [p.usage or Usage(0, 0, 0) for p in progress]
    prompts = usages[:: job.frame.num_choices]
    return Usage(
        prompt_tokens=sum(u.prompt_tokens for u in prompts),
        completion_tokens=0 if job.frame.drops_output else sum(u.completion_tokens for u in usages),
        cached_tokens=sum(u.cached_tokens for u in prompts),
    )
