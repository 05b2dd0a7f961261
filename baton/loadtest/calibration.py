"""Before a run: is the server there, does it serve the model, how many tokens is a word.

Two one-token requests of different lengths, answered by the server as all others: what it counts
for them gives the tokens per word and those that every request has beyond its words.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from baton.core.errors import ConfigError, InternalError, NotFound, Unavailable
from baton.loadtest.outcome import ErrorKind, Outcome
from baton.loadtest.prompt_text import TokenCost, words
from baton.loadtest.target import Ask, Message, Prompt, Target

POLL_S = 0.5
PROBE_WORDS = (16, 112)
MAX_SHOWN_NAMES = 8


async def wait_until_there(
    target: Target, timeout_s: float, *, sleep_s: float = POLL_S
) -> list[str]:
    """Names of the models served, at least one. Raises Unavailable when the time is over, and at
    once what waiting does not help."""
    loop = asyncio.get_running_loop()
    until_s = loop.time() + timeout_s
    while True:
        try:
            names = await target.model_names()
        except Unavailable as error:
            reason = str(error)
        else:
            if names:
                return names
            reason = f"{target.place} serves no model yet"
        if loop.time() >= until_s:
            raise Unavailable(
                f"{reason} (waited {timeout_s:g} s); start it with `make serve`, name another with "
                "--url, or wait longer with --wait"
            )
        await asyncio.sleep(sleep_s)


def choose_model(wanted: str, names: list[str]) -> str:
    """Raises NotFound naming those that are served."""
    if not wanted:
        return names[0]
    if wanted not in names:
        shown = ", ".join(names[:MAX_SHOWN_NAMES])
        raise NotFound(f"the server does not serve {wanted[:100]!r}; it serves {shown}")
    return wanted


async def measure_token_cost(target: Target, now: Callable[[], float], run: str) -> TokenCost:
    """`run`: a name no other run has, so that nothing of the probes is cached.

    Raises Unavailable, ConfigError or InternalError when a plain request is not answered.
    """
    counts = [await _probe(target, now, f"{run}.probe.{number}", number) for number in PROBE_WORDS]
    per_word = (counts[1] - counts[0]) / (PROBE_WORDS[1] - PROBE_WORDS[0])
    if per_word <= 0:
        raise InternalError(
            f"the server counts {counts[0]} and {counts[1]} tokens for {PROBE_WORDS[0]} and "
            f"{PROBE_WORDS[1]} words: it does not count prompts, and lengths cannot be kept"
        )
    # One word is one token for most tokenizers, and then exactly so.
    per_word = 1.0 if abs(per_word - 1) < 0.03 else per_word
    return TokenCost(max(0.0, counts[1] - per_word * PROBE_WORDS[1]), per_word)


async def _probe(target: Target, now: Callable[[], float], name: str, number: int) -> int:
    prompt = Prompt((Message("user", words(name, number)),))
    outcome = Outcome(0, now)
    await target.prepare(Ask(prompt, 1, f"bench-{name}")).run(outcome)
    if outcome.error is not None:
        reason = f"a first request to {target.place} was not answered: {outcome.error.label}"
        text = f"{reason}: {outcome.error.message}"
        if outcome.error.kind is ErrorKind.REFUSED and outcome.error.code[:1] == "4":
            raise ConfigError(text)
        raise Unavailable(text)
    if not outcome.num_prompt_tokens:
        raise InternalError(
            f"{target.place} does not tell the tokens of a prompt (usage), so lengths cannot be "
            "kept; a server must answer stream_options.include_usage"
        )
    return outcome.num_prompt_tokens
