"""Prompts as JSON lines, plain or gzip; which of the shapes it is shows in each line.

    {"prompt": "..."}                                    one request; also under "text"
    {"messages": [{"role": "user", "content": "..."}]}   one request
    {"turns": ["...", "..."]}                            the user's part of a conversation
    {"conversations": [{"from": "human", "value": "..."}, ...]}   ShareGPT: the human's part
    [12, 340, 25, 80]                                    lengths: user, assistant, user, assistant

`output_tokens` or `max_tokens` in a line say how long its answers are.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from baton.core.errors import ConfigError
from baton.loadtest.prompt_text import Piece
from baton.loadtest.target import Message
from baton.loadtest.workload import MAX_TURNS, Conversation, Fitting, Turn

SHAPES = '"prompt", "messages", "turns", "conversations", or a list of lengths'
_HUMAN = ("human", "user")


def read_conversations(
    path: Path, *, num_output_tokens: int, fitting: Fitting, seed: int, limit: int | None = None
) -> list[Conversation]:
    """`num_output_tokens`: of answers whose line does not say. Raises ConfigError naming the file,
    and the line that is wrong."""
    conversations: list[Conversation] = []
    for number, line in _lines(path):
        if len(conversations) == limit:
            break
        name = f"{seed}.{number}"
        try:
            turns = _turns(orjson.loads(line), name, num_output_tokens, fitting)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path.name} line {number} is not a prompt ({error!r}); it must hold {SHAPES}"
            ) from None
        if not 1 <= len(turns) <= MAX_TURNS:
            raise ConfigError(
                f"{path.name} line {number} has {len(turns)} turns; it must have 1 to {MAX_TURNS}"
            )
        conversations.append(Conversation(len(conversations), turns))
    if not conversations:
        raise ConfigError(f"{path.name} has no prompts")
    return conversations


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read the prompts {path}: {reason}") from None


def _turns(row: Any, name: str, num_output: int, fitting: Fitting) -> tuple[Turn, ...]:
    if isinstance(row, list):
        return _of_lengths([int(n) for n in row], name, fitting)
    num_output = fitting.output(
        int(row.get("output_tokens") or row.get("max_tokens") or num_output)
    )
    if "messages" in row:
        messages = tuple(Message(str(m["role"]), str(m["content"])) for m in row["messages"])
        return (Turn(num_output, messages=messages),) if messages else ()
    if "prompt" in row or "text" in row:
        said = [row["prompt"] if "prompt" in row else row["text"]]
    elif "turns" in row:
        said = list(row["turns"])
    else:
        said = [t["value"] for t in row["conversations"] if t["from"] in _HUMAN]
    if not all(isinstance(text, str) and text for text in said):
        raise ValueError("a prompt must be a text that is not empty")
    return tuple(Turn(num_output, messages=(Message("user", text),)) for text in said)


def _of_lengths(lengths: list[int], name: str, fitting: Fitting) -> tuple[Turn, ...]:
    """A question without an answer is left out."""
    pairs = zip(lengths[::2], lengths[1::2], strict=False)
    return tuple(
        Turn(fitting.output(answer), (Piece(f"{name}.{i}", fitting.prompt(question)),))
        for i, (question, answer) in enumerate(pairs)
    )
