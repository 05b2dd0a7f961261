"""What a server is to the generator: something that takes a prompt and fills an outcome.

Two implementations: `openai_target.py` (HTTP), `grpc_target.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from baton.loadtest.outcome import Outcome


class Message(NamedTuple):
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """Messages of a conversation, or token ids."""

    messages: tuple[Message, ...] = ()
    ids: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """Of all messages, for routes that take one text."""
        return "".join(message.content for message in self.messages)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request before it is put into a server's words."""

    prompt: Prompt
    max_tokens: int
    request_id: str
    session: str = ""
    """Requests of one conversation have the same."""


class Exchange(Protocol):
    """A request ready to be sent, once."""

    async def run(self, outcome: Outcome) -> None:
        """Send it and read the answer into `outcome`; raises nothing but CancelledError."""
        ...


class Target(Protocol):
    @property
    def place(self) -> str:
        """Where it is, for people."""
        ...

    def prepare(self, ask: Ask) -> Exchange:
        """Everything that can be done before the request is due."""
        ...

    async def model_names(self) -> list[str]:
        """Raises Unavailable when nothing answers, or what else is wrong with it."""
        ...

    async def aclose(self) -> None: ...
