"""From what a client sent to what the dispatcher takes; shared by the HTTP and the gRPC edge.

Chooses the model, renders the chat template, tokenizes and checks everything against the model's
limits. Tokenizing a long text takes seconds, so it runs in a thread.

Does not know: JSON, protobuf, placement.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from baton.core.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotFound,
    NoWorker,
    RequestError,
)
from baton.core.request import SamplingParams
from services.router.edge.conversation import (
    PLAIN_CHAT,
    ChatOptions,
    check_messages,
    rendered,
)
from services.router.requests.generation import Generator, ModelCard
from services.router.tenants.quota_hold import QuotaHold
from services.router.tenants.tenants import Caller

T = TypeVar("T")

INLINE_CHARS = 4 * 1024
"""Texts up to this length are tokenized on the event loop: about 1 ms, an inter-token gap or less.
A thread costs 0.1 ms more and needs a tokenizer that lets go of the interpreter lock."""

CHARS_PER_MESSAGE = 16
"""What rendering one more message costs, in characters of text: role and separators."""

MAX_MESSAGES = 16_384

MAX_CHARS_PER_TOKEN = 512
"""No vocabulary has longer tokens, so longer prompts exceed the context without tokenizing."""

MAX_DEPTH = 64
"""Of schemas, and of what goes to a chat template."""

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024

_TOKENIZER_THREADS = 2
_CHECK_THREADS = 2


class Preprocessor:
    """Stateless but for its threads; one per router process."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._threads = ThreadPoolExecutor(_TOKENIZER_THREADS, thread_name_prefix="tokenize")
        # Of its own: what is slow to check must not keep prompts waiting.
        self._checks = ThreadPoolExecutor(_CHECK_THREADS, thread_name_prefix="check")

    def close(self) -> None:
        """Texts being tokenized are finished and thrown away."""
        for threads in (self._threads, self._checks):
            threads.shutdown(wait=False, cancel_futures=True)

    def model_card(self, name: str | None) -> ModelCard:
        """The card of model `name`; without a name that of the only model served.

        Raises ModelNotFound, NoWorker, or InvalidRequest when a name is needed.
        """
        cards = self._generator.models()
        if not cards:
            raise NoWorker("no worker is connected to this router yet; try again in a moment")
        if name:
            for card in cards:
                if card.name == name:
                    return card
        served = ", ".join(card.name for card in cards)
        if name:
            raise ModelNotFound(
                f"model {shorten(name)} does not exist; served here: {served}", param="model"
            )
        if len(cards) > 1:
            raise InvalidRequest(f"model is required; served here: {served}", param="model")
        return cards[0]

    async def hold_quota(self, caller: Caller, num_chars: int) -> QuotaHold | None:
        """To be called before prompts of together `num_chars` characters are made into tokens, and
        to be released at the end: asks whether the tenant may have them at all, where that costs
        less than the tokens. None: not asked, or nothing to hold. Raises QuotaExceeded."""
        if num_chars <= INLINE_CHARS:
            return None
        return await self._generator.hold_quota(caller.tenant, caller.limits)

    async def chat_prompt(
        self,
        card: ModelCard,
        messages: Sequence[Mapping[str, object]],
        options: ChatOptions = PLAIN_CHAT,
        *,
        add_special_tokens: bool = False,
        keep_last: int | None = None,
    ) -> tuple[int, ...]:
        """Token ids of the rendered conversation. The template writes BOS itself if it wants it.

        `messages` have `role` and `content`, a string. `keep_last`: how many of the ids, from the
        end. Raises InvalidRequest.
        """
        check_num_messages(len(messages), card.max_model_len)
        check_messages(messages, options)
        num_chars = sum(len(str(m["content"])) for m in messages)
        num_rendered_chars = num_chars + CHARS_PER_MESSAGE * len(messages)
        if options is not PLAIN_CHAT:
            num_chars += options.num_chars
            num_rendered_chars += options.num_chars
        _check_chars(card, num_chars, "messages")

        def render_and_encode() -> list[int]:
            text = rendered(card.tokenizer, messages, options)
            return card.tokenizer.encode(text, add_special_tokens=add_special_tokens)

        ids = await self._run(render_and_encode, num_rendered_chars)
        return self._fitting(card, tuple(ids), "messages", keep_last)

    async def text_prompt(
        self,
        card: ModelCard,
        text: str,
        *,
        param: str = "prompt",
        add_special_tokens: bool = True,
        keep_last: int | None = None,
    ) -> tuple[int, ...]:
        """Token ids of a raw text, with the special tokens that the tokenizer adds."""
        if not text:
            raise InvalidRequest("prompt is empty; send at least one character", param=param)
        _check_chars(card, len(text), param)
        ids = await self._run(
            lambda: card.tokenizer.encode(text, add_special_tokens=add_special_tokens), len(text)
        )
        return self._fitting(card, tuple(ids), param, keep_last)

    def token_prompt(
        self,
        card: ModelCard,
        token_ids: Sequence[object],
        *,
        param: str = "prompt",
        keep_last: int | None = None,
    ) -> tuple[int, ...]:
        """Token ids as the client sent them, of whatever type, checked against the vocabulary."""
        if keep_last is not None:
            token_ids = token_ids[-keep_last:]
        _check_length(card, token_ids, param)
        return check_token_ids(card, token_ids, param)

    def _fitting(
        self, card: ModelCard, ids: tuple[int, ...], param: str, keep_last: int | None
    ) -> tuple[int, ...]:
        if keep_last is not None:
            ids = ids[-keep_last:]
        _check_length(card, ids, param)
        return ids

    async def run(self, work: Callable[[], T]) -> T:
        """In a thread of those that tokenize."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def check(self, work: Callable[[], T]) -> T:
        """In a thread for what may take seconds."""
        return await asyncio.get_running_loop().run_in_executor(self._checks, work)

    async def _run(self, work: Callable[[], T], num_chars: int) -> T:
        if num_chars <= INLINE_CHARS:
            return work()
        return await self.run(work)


def check_num_messages(num_messages: int, max_model_len: int | None = None) -> None:
    """Raises InvalidRequest on more messages than a request may have, or than the context of
    `max_model_len` tokens can hold: a message takes at least one token."""
    if num_messages > MAX_MESSAGES:
        raise InvalidRequest(
            f"messages takes at most {MAX_MESSAGES} entries, got {num_messages}", param="messages"
        )
    if max_model_len is not None and num_messages >= max_model_len:
        raise _too_long(max_model_len, f"{num_messages} messages", "messages")


def check_sampling(card: ModelCard, sampling: SamplingParams) -> SamplingParams:
    """`sampling` with token ids checked against the vocabulary and top_k cut to it."""
    check_token_ids(card, sampling.stop_token_ids, "stop_token_ids")
    check_token_ids(card, [token_id for token_id, _ in sampling.logit_bias], "logit_bias")
    check_token_ids(card, sampling.allowed_token_ids, "allowed_token_ids")
    for word in sampling.bad_words_ids:
        check_token_ids(card, word, "bad_words")
    vocab_size = card.tokenizer.vocab_size
    if sampling.top_k > vocab_size:
        return dataclasses.replace(sampling, top_k=vocab_size)
    return sampling


def check_token_ids(card: ModelCard, token_ids: Sequence[object], param: str) -> tuple[int, ...]:
    """Raises InvalidRequest naming the first value that is no id of the vocabulary."""
    vocab_size = card.tokenizer.vocab_size
    valid = tuple([i for i in token_ids if type(i) is int and 0 <= i < vocab_size])
    if len(valid) != len(token_ids):
        wrong = next(i for i in token_ids if type(i) is not int or not 0 <= i < vocab_size)
        raise InvalidRequest(
            f"{param} must hold token ids from 0 to {vocab_size - 1}, got {describe(wrong)}",
            param=param,
        )
    return valid


def check_stop(stop: Sequence[str]) -> tuple[str, ...]:
    """Raises InvalidRequest on empty, too long or too many stop strings."""
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidRequest(
            f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(stop)}", param="stop"
        )
    for text in stop:
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise InvalidRequest(
                f"stop strings must have 1 to {MAX_STOP_CHARS} characters, got {len(text)}",
                param="stop",
            )
    return tuple(stop)


def output_tokens(
    card: ModelCard, num_prompt_tokens: int, asked: int | None, default: int | None
) -> int:
    """max_tokens of a request: as asked, else `default`, else the rest of the context.

    Raises ContextLengthExceeded when what was asked for does not fit.
    """
    room = card.max_model_len - num_prompt_tokens
    if asked is None:
        return room if default is None else min(default, room)
    if asked > room:
        raise ContextLengthExceeded(
            f"this model's context holds {card.max_model_len} tokens, but the prompt has "
            f"{num_prompt_tokens} and max_tokens asks for {asked} more; "
            f"use max_tokens <= {room} or leave it out",
            param="max_tokens",
        )
    return asked


def new_id(prefix: str) -> str:
    """A name for one request, unique over all routers."""
    return f"{prefix}-{random.getrandbits(128):032x}"


def check_depth(value: object, param: str, limit: int = MAX_DEPTH) -> None:
    """Raises InvalidRequest for JSON that is nested deeper than our own encoders go."""
    layer, depth = [value], 0
    while layer:
        depth += 1
        if depth > limit:
            raise InvalidRequest(
                f"{param} is nested more than {limit} levels deep; flatten it", param=param
            )
        inner: list[object] = []
        for entry in layer:
            if isinstance(entry, dict):
                inner += entry.values()
            elif isinstance(entry, list):
                inner += entry
        layer = inner


def shorten(value: str, limit: int = 80) -> str:
    """A client's string fit for an error message."""
    return repr(value if len(value) <= limit else value[:limit] + "...")


def describe(value: object) -> str:
    """A JSON value for an error message, short whatever its size or depth."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"{value}"
        case str():
            return shorten(value)
        case list():
            return f"a list of {len(value)}"
        case dict():
            return "an object"
    return type(value).__name__


def _check_chars(card: ModelCard, num_chars: int, param: str) -> None:
    limit = card.max_model_len * MAX_CHARS_PER_TOKEN
    if num_chars > limit:
        raise _too_long(card.max_model_len, f"{num_chars} characters", param)


def _check_length(card: ModelCard, token_ids: Sequence[object], param: str) -> None:
    if not token_ids:
        raise InvalidRequest("prompt is empty; send at least one token", param=param)
    if len(token_ids) >= card.max_model_len:
        raise _too_long(card.max_model_len, f"{len(token_ids)} tokens", param)


def _too_long(max_model_len: int, size: str, param: str) -> RequestError:
    return ContextLengthExceeded(
        f"this model's context holds {max_model_len} tokens, prompt and output together, but "
        f"the prompt has {size}; shorten it to at most {max_model_len - 1} tokens",
        param=param,
    )
