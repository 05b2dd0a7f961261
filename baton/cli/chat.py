"""`baton chat`: a conversation in the terminal, streamed from a running server.

The whole conversation is sent with every question; the server's prefix cache makes that cheap.
Ctrl-C while an answer streams ends that answer only, at the prompt it ends the program.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from baton.core.errors import BatonError, Unavailable

if TYPE_CHECKING:
    from baton.cli.chat_client import AnswerStats, ChatClient, ChatMessage, ChatOptions

DEFAULT_URL = "http://127.0.0.1:8000"
PROMPT = "> "
KEY_VARIABLE = "OPENAI_API_KEY"
"""As other clients of this API have it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url", default=DEFAULT_URL, help="the server's HTTP address (default: %(default)s)"
    )
    parser.add_argument("--model", metavar="NAME", help="default: the first model served")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--max-tokens", type=int, default=512, metavar="N", help="per answer (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, metavar="X", help="0 always takes the likeliest token"
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"where the server asks for one (default: the variable {KEY_VARIABLE})",
    )
    parser.add_argument("--once", metavar="PROMPT", help="print one answer and exit")
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="S",
        help="seconds without any text until the server counts as stuck (default: %(default)g)",
    )


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from baton.cli.chat_client import ChatClient, ChatOptions

    api_key = args.api_key or environ.get(KEY_VARIABLE, "")
    with ChatClient(args.url, timeout_s=args.timeout, api_key=api_key) as client:
        model: str = args.model or _first_model(client)
        options = ChatOptions(model=model, max_tokens=args.max_tokens, temperature=args.temperature)
        conversation = Conversation(client, options, system=args.system)
        if args.once is not None:
            conversation.ask(args.once)
            return 0
        _note(f"{model} at {args.url}; /reset forgets the conversation, /exit or Ctrl-D ends it")
        _interact(conversation)
    return 0


def _first_model(client: ChatClient) -> str:
    names = client.model_names()
    if not names:
        raise Unavailable("the server serves no model yet; try again when its workers are up")
    return names[0]


@dataclass(slots=True)
class Conversation:
    """Questions and answers so far. A question without an answer is not remembered."""

    client: ChatClient
    options: ChatOptions
    system: str | None = None
    history: list[ChatMessage] = field(default_factory=list)

    def ask(self, question: str) -> None:
        """Stream the answer to stdout, then how long it took to stderr.

        KeyboardInterrupt ends the answer; what came until then is remembered.
        Raises BatonError when the server cannot answer.
        """
        from baton.cli.chat_client import AnswerStats, ChatMessage

        stats = AnswerStats()
        asked = [*self.history, ChatMessage("user", question)]
        opening = [ChatMessage("system", self.system)] if self.system else []
        pieces: list[str] = []
        is_interrupted = False
        stream = self.client.stream([*opening, *asked], self.options, stats)
        try:
            for text in stream:
                pieces.append(text)
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            is_interrupted = True
        finally:
            stream.close()
            print(flush=True)
        if pieces:
            self.history = [*asked, ChatMessage("assistant", "".join(pieces))]
        _note(_summary(stats, is_interrupted=is_interrupted))

    def reset(self) -> None:
        self.history = []


def _interact(conversation: Conversation) -> None:
    # Importing it gives input() line editing and a history.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            question = input(PROMPT).strip()
        except EOFError:
            print()
            return
        if question == "/exit":
            return
        if question == "/reset":
            conversation.reset()
            _note("the conversation is forgotten")
        elif question.startswith("/"):
            _note(f"unknown command {question}; there are /reset and /exit")
        elif question:
            try:
                conversation.ask(question)
            except BatonError as error:
                _note(f"error: {error}")


def _summary(stats: AnswerStats, *, is_interrupted: bool) -> str:
    parts = ["stopped"] if is_interrupted else []
    if stats.ttft_s is not None:
        parts.append(f"first token after {stats.ttft_s * 1000:.0f} ms")
    rate = stats.decode_tokens_per_s
    if rate is not None:
        parts.append(f"then {rate:.1f} tokens/s")
    if stats.completion_tokens is not None:
        parts.append(f"{stats.completion_tokens} tokens")
    if stats.prompt_tokens is not None:
        cached = f", {stats.cached_tokens} of them cached" if stats.cached_tokens else ""
        parts.append(f"prompt of {stats.prompt_tokens}{cached}")
    if stats.finish_reason == "length":
        parts.append("cut at --max-tokens or the context limit")
    return ", ".join(parts) or "no text"


def _note(message: str) -> None:
    """Beside the conversation: to stderr, dim on a terminal."""
    if sys.stderr.isatty():
        message = f"\x1b[2m{message}\x1b[0m"
    print(message, file=sys.stderr, flush=True)
