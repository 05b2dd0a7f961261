"""What fuzz tests share: cases that can be replayed, mutations, and a run against the clock.

Case number i of a campaign draws everything from a generator of its own, made of the campaign's
seed and i, so that FUZZ_SEED=seed FUZZ_CASE=i repeats it alone.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

MAX_COMPLAINTS = 10
CANARY_PERIOD_S = 2.0
CASE_TIMEOUT_S = 60.0

TOKENS = (
    b"\r\n", b"\0", b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"{", b"[", b"}", b"]", b'"', b"\\",
    b"\\ud800", b"null", b"true", b"-1", b"0", b"1e999", b"18446744073709551616",
    b"-9223372036854775809", b"NaN", b"[" * 300, b'{"a":' * 200, b"chunked",
    b"Content-Length: 5\r\n", b"%00", b"../", b"?a=b", b"x" * 5000, b"stream",
    b"tiny", b"HTTP/1.1",
    b"HTTP/0.9", b"PRI * HTTP/2.0",
)  # fmt: skip
STRINGS = (
    "", "tiny", "user", "assistant", "text_input", "input_ids", "sampling_parameters", "BYTES",
    "INT32", "stream", "max_tokens", "stop", "text_output", "{}", "[1]", '{"type":"object"}',
    "[a-z]+", "x" * 3000, "\0", "\U0001f600", "a", "1", "timeout",
)  # fmt: skip
INTEGERS = (
    0,
    1,
    2,
    5,
    16,
    255,
    256,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**64 - 1,
    -1,
    -(2**31),
)
FLOATS = (0.0, 1.0, -1.0, 0.5, 1e-9, 1e30, float("nan"), float("inf"))

Case = Callable[[int, random.Random], Awaitable[str | None]]
"""Runs one; returns what is wrong with the answer."""


@dataclass(frozen=True, slots=True)
class Campaign:
    """Which cases run, and for how long."""

    seed: int
    seconds: float
    only: int | None = None
    """This case alone."""

    @classmethod
    def of_environment(cls) -> Campaign:
        """FUZZ_SECONDS, FUZZ_SEED (otherwise a new one) and FUZZ_CASE."""
        seed = os.environ.get("FUZZ_SEED") or random.SystemRandom().randrange(2**32)
        only = os.environ.get("FUZZ_CASE")
        seconds = float(os.environ.get("FUZZ_SECONDS") or 600)
        return cls(int(seed), seconds, int(only) if only else None)

    def rng(self, number: int) -> random.Random:
        return random.Random(f"{self.seed}:{number}")

    def replay(self, number: int) -> str:
        return f"FUZZ_SEED={self.seed} FUZZ_CASE={number}"


@dataclass
class Outcome:
    """What a run has seen."""

    num_cases: int = 0
    complaints: list[str] = field(default_factory=list)


async def run(
    campaign: Campaign,
    case: Case,
    *,
    canary: Callable[[], Awaitable[None]] | None = None,
    max_cases: int = 10**9,
    num_at_a_time: int = 8,
) -> Outcome:
    """Cases until time is up or enough have failed; `canary` runs beside them, and raises when the
    service does not do its work."""
    outcome = Outcome()
    if campaign.only is not None:
        complaint = await case(campaign.only, campaign.rng(campaign.only))
        outcome.num_cases += 1
        outcome.complaints += [complaint] if complaint else []
        return outcome
    ends_at_s = time.monotonic() + campaign.seconds

    def is_over() -> bool:
        return (
            time.monotonic() > ends_at_s
            or outcome.num_cases >= max_cases
            or len(outcome.complaints) >= MAX_COMPLAINTS
        )

    async def work() -> None:
        while not is_over():
            number = outcome.num_cases
            outcome.num_cases += 1
            try:
                async with asyncio.timeout(CASE_TIMEOUT_S):
                    complaint = await case(number, campaign.rng(number))
            except TimeoutError:
                complaint = f"no end within {CASE_TIMEOUT_S:g} s"
            except OSError as error:
                complaint = f"no connection: {error}"
            if complaint:
                outcome.complaints.append(f"{campaign.replay(number)}: {complaint}")

    async def watch() -> None:
        while canary is not None and not is_over():
            await canary()
            await asyncio.sleep(CANARY_PERIOD_S)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(num_at_a_time):
            tasks.create_task(work())
        tasks.create_task(watch())
    return outcome


def mutate(data: bytes, rng: random.Random, others: Sequence[bytes] = ()) -> bytes:
    """`data` with one to eight things done to it; `others` are what pieces are taken from."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(changed) + 1)
        end = min(len(changed), at + rng.choice((1, 1, 2, 4, 16, 64)))
        match rng.randrange(7):
            case 0:
                changed[at:at] = rng.choice(TOKENS)
            case 1:
                del changed[at:end]
            case 2:
                changed[at:end] = rng.choice(TOKENS)
            case 3:
                changed[at:at] = changed[at:end] * rng.choice((1, 2, 50))
            case 4 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 5 if others:
                other = rng.choice(others)
                begin = rng.randrange(len(other) + 1)
                changed[at:at] = other[begin : begin + rng.choice((4, 40, 400))]
            case _:
                changed[at:end] = rng.randbytes(end - at)
    return bytes(changed)


def random_message(cls: type[Message], rng: random.Random, depth: int = 0) -> Message:
    """A message whose fields hold values that are often too small, too large or none at all."""
    message = cls()
    share = rng.choice((0.1, 0.3, 0.6))
    for field_ in cls.DESCRIPTOR.fields:
        if rng.random() > share or (field_.message_type is not None and depth >= 4):
            continue
        _fill(message, field_, rng, depth)
    return message


def _fill(message: Message, field_: FieldDescriptor, rng: random.Random, depth: int) -> None:
    target = getattr(message, field_.name)
    kind = field_.message_type
    if kind is not None and kind.GetOptions().map_entry:
        key, value = kind.fields
        for _ in range(rng.randrange(3)):
            name = _scalar(key, rng)
            if value.message_type is None:
                target[name] = _scalar(value, rng)
            else:
                target[name].CopyFrom(
                    random_message(value.message_type._concrete_class, rng, depth + 1)
                )
    elif field_.is_repeated:
        for _ in range(rng.choice((0, 1, 1, 2, 5))):
            if kind is None:
                target.append(_scalar(field_, rng))
            else:
                target.add().CopyFrom(random_message(kind._concrete_class, rng, depth + 1))
    elif kind is not None:
        target.CopyFrom(random_message(kind._concrete_class, rng, depth + 1))
    else:
        setattr(message, field_.name, _scalar(field_, rng))


def _scalar(field_: FieldDescriptor, rng: random.Random) -> Any:
    match field_.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING if field_.type == FieldDescriptor.TYPE_BYTES:
            return rng.choice((b"", b"abc", b"\xff\xfe", rng.randbytes(9), b"\3\0\0\0abc"))
        case FieldDescriptor.CPPTYPE_STRING:
            return rng.choice(STRINGS)
        case FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return rng.choice(FLOATS)
        case FieldDescriptor.CPPTYPE_ENUM:
            return rng.choice((*(v.number for v in field_.enum_type.values), 77))
        case FieldDescriptor.CPPTYPE_UINT32:
            return rng.choice([i for i in INTEGERS if 0 <= i < 2**32])
        case FieldDescriptor.CPPTYPE_UINT64:
            return rng.choice([i for i in INTEGERS if i >= 0])
        case FieldDescriptor.CPPTYPE_INT32:
            return rng.choice([i for i in INTEGERS if -(2**31) <= i < 2**31])
    return rng.choice([i for i in INTEGERS if -(2**63) <= i < 2**63])
