"""Questions of the event loop that another thread answers.

Not known here: what is asked, and how a command gets to the other thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from baton.core.errors import BatonError

Command = Callable[[], None]
T = TypeVar("T")


class Post(Protocol):
    def __call__(self, callback: Callable[..., None], *args: object) -> None:
        """On the other thread: run `callback` on the event loop."""
        ...


class Answers:
    """The questions that wait for their answers. Called on the event loop's thread."""

    def __init__(self, send: Callable[[Command], bool], post: Post) -> None:
        """`send` has the other thread run a command, and says False when it will not."""
        self._send = send
        self._post = post
        self._waiting: set[asyncio.Future[Any]] = set()

    async def ask(
        self,
        question: Callable[[], T],
        *,
        otherwise: BatonError,
        undo: Callable[[T], None] | None = None,
    ) -> T:
        """What `question` returns or raises on the other thread; `otherwise` when it is not asked.

        `undo` gets the answer when whoever asked was cancelled, before or after it came.
        """
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def resolve(value: T | None, error: BaseException | None) -> None:
            if answer.done():
                if undo is not None and error is None:
                    undo(value)  # type: ignore[arg-type]
            elif error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(value)  # type: ignore[arg-type]

        def run() -> None:
            try:
                value = question()
            except Exception as error:
                self._post(resolve, None, error)
            else:
                self._post(resolve, value, None)

        if not self._send(run):
            raise otherwise
        self._waiting.add(answer)
        try:
            return await answer
        except asyncio.CancelledError:
            if undo is not None and _has_result(answer):
                undo(answer.result())
            raise
        finally:
            self._waiting.discard(answer)

    def refuse(self, error: BatonError) -> None:
        """No answer will come any more."""
        for answer in list(self._waiting):
            if not answer.done():
                answer.set_exception(error)


def _has_result(answer: asyncio.Future[T]) -> bool:
    return answer.done() and not answer.cancelled() and answer.exception() is None
