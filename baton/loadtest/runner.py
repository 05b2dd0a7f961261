"""Open and closed loops over conversations: who is sent when, and what became of it.

Open: conversations begin when they are due, whatever the answers; later turns follow the answer
before them. Closed: so many conversations at a time, one after the other. Either way at most the
wanted number of requests, none begun after the wanted time, each within its own deadline: a run
ends. `stop` ends it early; what was under way then is given up and not counted.

Does not know: what a server is, texts, figures.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field

from baton.loadtest.options import LoadOptions
from baton.loadtest.outcome import ErrorKind, Outcome
from baton.loadtest.prompt_text import TokenCost, ids_of, text_of
from baton.loadtest.target import Ask, Exchange, Message, Prompt, Target
from baton.loadtest.workload import Conversation, Turn


@dataclass(slots=True)
class Progress:
    """So far."""

    num_begun: int = 0
    num_ended: int = 0
    num_failed: int = 0
    in_flight: int = 0
    num_output_tokens: int = 0
    """Of requests that have ended."""


@dataclass(frozen=True, slots=True)
class Wording:
    """How lengths become prompts."""

    cost: TokenCost
    run_name: str
    """Part of every request's id."""
    vocab_size: int | None = None
    """Prompts are token ids below it, instead of texts."""

    def first_words(self, turn: Turn) -> tuple[Message, ...]:
        return turn.messages or (Message("user", text_of(turn.pieces, self.cost)),)

    def prompt(self, turn: Turn, said: tuple[Message, ...]) -> Prompt:
        """`said`: before this turn."""
        if self.vocab_size is not None and turn.pieces:
            return Prompt(ids=tuple(ids_of(turn.pieces, self.vocab_size)))
        return Prompt((*said, *self.first_words(turn)))


@dataclass(slots=True)
class LoadRunner:
    """One run. `now`: seconds since its start."""

    target: Target
    wording: Wording
    options: LoadOptions
    now: Callable[[], float]
    progress: Progress = field(default_factory=Progress)
    outcomes: list[Outcome] = field(default_factory=list)
    """In the order in which requests were begun."""
    is_stopped: bool = False
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _defect: BaseException | None = None

    async def run(self, conversations: Iterable[Conversation], *, is_open: bool) -> None:
        """`conversations` of an open loop are in the order of their times."""
        loop = self._open(iter(conversations)) if is_open else self._closed(iter(conversations))
        work = asyncio.create_task(loop)
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            everything = {work, stopping, *self._tasks}
            for task in everything:
                task.cancel()
            await asyncio.gather(*everything, return_exceptions=True)
        if self._defect is not None:
            raise self._defect
        if not work.cancelled():
            work.result()

    def stop(self) -> None:
        self.is_stopped = True
        self._stop.set()

    async def _open(self, conversations: Iterator[Conversation]) -> None:
        for conversation in conversations:
            at_s = conversation.at_s or 0.0
            if at_s >= self.options.duration_s or not self._may_begin():
                break
            self.progress.num_begun += 1
            # Made before it is due, so that long prompts do not make it late.
            first = self._prepared(conversation, 0, ())
            await asyncio.sleep(max(0.0, at_s - self.now()))
            if self.now() >= self.options.duration_s:
                break
            if len(self._tasks) >= self.options.max_in_flight:
                self._note_not_sent(conversation, at_s)
                continue
            self._start(self._converse(conversation, first, at_s))
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _closed(self, conversations: Iterator[Conversation]) -> None:
        for _ in range(self.options.concurrency or 1):
            self._start(self._one_after_the_other(conversations))
        await asyncio.wait(self._tasks)

    async def _one_after_the_other(self, conversations: Iterator[Conversation]) -> None:
        while self._may_begin():
            conversation = next(conversations, None)
            if conversation is None:
                return
            self.progress.num_begun += 1
            await self._converse(conversation, self._prepared(conversation, 0, ()), None)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        """Faults of servers are outcomes; anything else is our own defect and ends the run."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._defect = self._defect or error
            self._stop.set()

    async def _converse(
        self, conversation: Conversation, first: Exchange, at_s: float | None
    ) -> None:
        said: tuple[Message, ...] = ()
        exchange = first
        for number, turn in enumerate(conversation.turns):
            if number:
                left_s = max(0.0, self.options.duration_s - self.now())
                await asyncio.sleep(min(turn.think_s, left_s))
                if not self._may_begin():
                    return
                self.progress.num_begun += 1
                exchange = self._prepared(conversation, number, said)
            is_last = number == len(conversation.turns) - 1
            outcome = await self._send(
                exchange, turn, number, None if number else at_s, not is_last
            )
            if outcome.error is not None:
                return
            if not is_last:
                said = (*said, *self.wording.first_words(turn), Message("assistant", outcome.text))

    async def _send(
        self, exchange: Exchange, turn: Turn, number: int, at_s: float | None, keeps_text: bool
    ) -> Outcome:
        outcome = self._new_outcome(at_s, turn, number)
        outcome.is_text_kept = keeps_text
        self.progress.in_flight += 1
        try:
            await exchange.run(outcome)
        finally:
            self.progress.in_flight -= 1
        self.progress.num_ended += 1
        self.progress.num_failed += outcome.error is not None
        self.progress.num_output_tokens += outcome.num_tokens
        return outcome

    def _note_not_sent(self, conversation: Conversation, at_s: float) -> None:
        outcome = self._new_outcome(at_s, conversation.turns[0], 0)
        outcome.sent_s = self.now()
        limit = self.options.max_in_flight
        outcome.fail(ErrorKind.NOT_SENT, f"{limit} requests were under way; raise --max-in-flight")
        self.progress.num_ended += 1
        self.progress.num_failed += 1

    def _new_outcome(self, at_s: float | None, turn: Turn, number: int) -> Outcome:
        outcome = Outcome(
            len(self.outcomes),
            self.now,
            planned_s=at_s,
            turn=number,
            num_asked_tokens=turn.num_output_tokens,
        )
        self.outcomes.append(outcome)
        return outcome

    def _prepared(
        self, conversation: Conversation, number: int, said: tuple[Message, ...]
    ) -> Exchange:
        turn = conversation.turns[number]
        name = f"{self.wording.run_name}-{conversation.number}"
        ask = Ask(
            self.wording.prompt(turn, said),
            turn.num_output_tokens,
            f"bench-{name}-{number}",
            session=f"bench-{name}" if len(conversation.turns) > 1 else "",
        )
        return self.target.prepare(ask)

    def _may_begin(self) -> bool:
        """Whoever is told yes counts it before anything else runs."""
        in_time = self.now() < self.options.duration_s
        return in_time and self.progress.num_begun < self.options.num_requests
