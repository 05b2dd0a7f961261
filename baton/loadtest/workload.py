"""What is sent: conversations of one turn or several, with lengths in tokens or texts of a file.

    lengths      pairs of prompt and output tokens, drawn with replacement
    + prefixes   each prompt begins with one of some shared stretches
    + turns      each conversation goes on, and repeats what was said, the server's words included
    trace        arrivals of a file, with the prefixes that it says are shared
    file         prompts and conversations as they are

Lengths, traces and their file formats are those of the simulator, so the same load can be
simulated and measured. Does not know: how texts are made, when conversations begin.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from baton.core.errors import ConfigError
from baton.loadtest.prompt_text import Piece
from baton.loadtest.target import Message
from baton.simulator.arrivals import RequestLengths
from baton.simulator.workload import Arrival

MAX_TURNS = 1000
MAX_PROMPT_TOKENS = 4_000_000


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: what is said new in it, as lengths or as words."""

    num_output_tokens: int
    pieces: tuple[Piece, ...] = ()
    messages: tuple[Message, ...] = ()
    """Instead of pieces."""
    think_s: float = 0.0
    """From the end of the answer before it."""


@dataclass(frozen=True, slots=True)
class Conversation:
    number: int
    turns: tuple[Turn, ...]
    at_s: float | None = None
    """Its first turn, where the workload has times of its own."""


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """`groups` stretches of `num_tokens`; each conversation begins with one of them."""

    num_tokens: int = 0
    groups: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.num_tokens <= MAX_PROMPT_TOKENS or not 1 <= self.groups <= 1_000_000:
            raise ConfigError(
                f"--prefix takes tokens or tokens x groups, such as 512x8; got "
                f"{self.num_tokens}x{self.groups}"
            )


@dataclass(frozen=True, slots=True)
class Turns:
    """How conversations made up from lengths go on."""

    low: int = 1
    high: int = 1
    think_s: float = 0.0
    """Mean of the exponential time between an answer and the next question."""

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high <= MAX_TURNS:
            raise ConfigError(
                f"--turns takes a number or a range up to {MAX_TURNS}, such as 4 or 2-6; got "
                f"{self.low}-{self.high}"
            )
        if not 0 <= self.think_s <= 3600:
            raise ConfigError(f"--think must be between 0 and 3600 seconds, got {self.think_s:g}")

    @property
    def mean(self) -> float:
        return (self.low + self.high) / 2


@dataclass(frozen=True, slots=True)
class Fitting:
    """Changes to lengths, so that a trace of large models fits a small one."""

    scale: float = 1.0
    max_prompt_tokens: int = MAX_PROMPT_TOKENS
    max_output_tokens: int = 1_000_000

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1000:
            raise ConfigError(f"--scale-lengths must be above 0 and at most 1000, got {self.scale}")
        for name in ("max_prompt_tokens", "max_output_tokens"):
            if getattr(self, name) < 1:
                option = f"--{name.replace('_', '-').removesuffix('-tokens')}"
                raise ConfigError(f"{option} must be at least 1, got {getattr(self, name)}")

    def prompt(self, num_tokens: int) -> int:
        return min(self.max_prompt_tokens, max(1, round(num_tokens * self.scale)))

    def output(self, num_tokens: int) -> int:
        return min(self.max_output_tokens, max(1, round(num_tokens * self.scale)))


@dataclass(frozen=True, slots=True)
class MadeUp:
    """Conversations from lengths, without end."""

    lengths: tuple[RequestLengths, ...]
    spread: float = 0.0
    """Lengths are drawn evenly from ± this share of themselves."""
    prefixes: SharedPrefixes = field(default_factory=SharedPrefixes)
    turns: Turns = field(default_factory=Turns)
    fitting: Fitting = field(default_factory=Fitting)

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ConfigError("no lengths to draw from")
        if not 0 <= self.spread < 1:
            raise ConfigError(f"--spread must be at least 0 and below 1, got {self.spread:g}")

    def conversations(self, seed: int) -> Iterator[Conversation]:
        rng = random.Random(seed)
        number = 0
        while True:
            yield self._one(number, seed, rng)
            number += 1

    def _one(self, number: int, seed: int, rng: random.Random) -> Conversation:
        turns = []
        for i in range(rng.randint(self.turns.low, self.turns.high)):
            drawn = rng.choice(self.lengths)
            num_prompt = self.fitting.prompt(self._near(drawn.num_prompt_tokens, rng))
            pieces = [Piece(f"{seed}.{number}.{i}", num_prompt)]
            if i == 0 and self.prefixes.num_tokens:
                group = rng.randrange(self.prefixes.groups)
                pieces.insert(0, Piece(f"{seed}.prefix.{group}", self.prefixes.num_tokens))
            think_s = rng.expovariate(1 / self.turns.think_s) if i and self.turns.think_s else 0.0
            num_output = self.fitting.output(self._near(drawn.num_output_tokens, rng))
            turns.append(Turn(num_output, tuple(pieces), think_s=think_s))
        return Conversation(number, tuple(turns))

    def _near(self, num_tokens: int, rng: random.Random) -> int:
        if not self.spread:
            return num_tokens
        return max(1, round(num_tokens * rng.uniform(1 - self.spread, 1 + self.spread)))


def replayed(
    arrivals: Sequence[Arrival], block_size: int, fitting: Fitting, seed: int
) -> list[Conversation]:
    """A trace as it came. Equal blocks of the trace are equal words, here and in other runs of the
    same seed."""
    conversations = []
    for arrival in arrivals:
        wanted = fitting.prompt(arrival.num_prompt_tokens)
        pieces, num_tokens = [], 0
        for block in arrival.block_hashes:
            size = min(max(1, round(block_size * fitting.scale)), wanted - num_tokens)
            if size <= 0:
                break
            pieces.append(Piece(f"{seed}.{block!r}", size))
            num_tokens += size
        if wanted > num_tokens:
            pieces.append(Piece(f"{seed}.{arrival.number}", wanted - num_tokens))
        turn = Turn(fitting.output(arrival.num_output_tokens), tuple(pieces))
        conversations.append(Conversation(arrival.number, (turn,), arrival.at_s))
    return conversations
