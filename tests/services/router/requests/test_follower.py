"""What clients get of what workers send: the short way of plain tokens and the whole one agree."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from baton.core.lifecycle import Timeline
from baton.core.request import FinishReason, RequestId, SamplingParams, TokenDelta, TokenLogprobs
from baton.core.worker_info import Role, WorkerId
from baton.telemetry.metrics import Metrics
from services.router.placement.placement import Placement, PlacementKind, ScoreTerms
from services.router.requests.attempt import Attempt, WorkOrder
from services.router.requests.breaker import BreakerConfig
from services.router.requests.detokenize import TextStage
from services.router.requests.failure_book import FailureBook
from services.router.requests.flight import Flight
from services.router.requests.follower import Follower
from services.router.requests.generation import GenerationDelta, GenerationInput
from services.router.requests.mailbox import Arrival, Mailbox
from services.router.requests.request_log import RequestRecorder
from services.router.requests.request_record import RequestRecord
from services.router.requests.retry_config import RetryConfig

PROMPT = (1, 2, 3)
PREFILL, DECODE = WorkerId("p0"), WorkerId("d0")


class Letters:
    """One letter a token; every seventh token shows nothing until the next one."""

    def __init__(self) -> None:
        self.held = ""

    def push(self, token_ids):
        text = self.held + "".join(chr(97 + i % 26) for i in token_ids)
        self.held = text[-1:] if token_ids[-1] % 7 == 0 else ""
        return text[: len(text) - len(self.held)]

    def flush(self):
        return self.held


class WholeWay(TextStage):
    """Nothing is plain to it."""

    is_plain = False


class Worker:
    """A session that takes note of nothing."""

    def __init__(self, role: Role) -> None:
        self.info = type("Info", (), {"role": role})()

    def cancel(self, request_id, reason): ...
    def forget(self, request_id): ...


@dataclass
class Followed:
    """One request on p0 and d0, and what its client got."""

    text_stage: type[TextStage]
    metrics: Metrics = field(default_factory=Metrics)
    deltas: list[GenerationDelta] = field(default_factory=list)
    error: Exception | None = None

    def __post_init__(self) -> None:
        terms = tuple(
            ScoreTerms(w, role, 0, 3, 0, 0, 0, 0, 0.0, 0.0)
            for w, role in ((PREFILL, Role.PREFILL), (DECODE, Role.DECODE))
        )
        sampling = SamplingParams(max_tokens=1000, temperature=0.0)
        self.flight = Flight(
            GenerationInput(RequestId("r"), "m", PROMPT, sampling),
            WorkOrder(PROMPT, sampling, (0,)),
            self.text_stage(Letters()),
            RequestRecord(RequestId("r"), "m", len(PROMPT)),
            deadline_at_s=1e9,
        )
        placement = Placement(PlacementKind.REMOTE_PREFILL, PREFILL, DECODE, 0.0, "", terms)
        attempt = Attempt(RequestId("r.1"), placement, Mailbox(64, now_s=0.0))
        attempt.sessions = {PREFILL: Worker(Role.PREFILL), DECODE: Worker(Role.DECODE)}
        attempt.unfinished = {PREFILL, DECODE}
        self.flight.attempt = attempt
        self.follower = Follower(
            None,
            recorder=RequestRecorder(self.metrics),
            failures=FailureBook(RetryConfig(), BreakerConfig(), metrics=self.metrics),
            max_retries=3,
        )

    def follow(self, arrivals: list[Arrival]) -> None:
        if self.flight.attempt is not None and self.error is None:
            deltas, self.error = self.follower.follow(self.flight, arrivals)
            self.deltas += deltas

    def seen(self) -> object:
        record = self.flight.record
        itl = [x for x in self.metrics.render().decode().splitlines() if "inter_token" in x]
        return (
            self.deltas, repr(self.error), self.flight.stream.token_ids, record.failures,
            record.num_output_tokens, record.last_token_at_s, record.num_cached_tokens,
            record.finish_reason, record.timeline, self.flight.attempt is None, itl,
        )  # fmt: skip


def arrivals_of(rng: random.Random) -> list[Arrival]:
    """The first token from p0, the others from d0 in pieces; then perhaps something is wrong."""
    at_s, first = 10.0, TokenDelta("r.1", 0, [5], timeline=Timeline(), num_cached_tokens=2)
    found = [Arrival(PREFILL, at_s, first)]
    index, num_tokens = 1, rng.randrange(2, 40)
    while index < num_tokens:
        ids = [rng.randrange(1, 300) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        at_s += rng.random()
        delta = TokenDelta("r.1", index, ids)
        match rng.random():
            case x if x < 0.1:
                delta.logprobs = [TokenLogprobs(i, -0.5) for i in ids]
            case x if x < 0.15:
                # Told twice, as after a replay.
                back = rng.randrange(1, index + 1)
                delta = TokenDelta("r.1", index - back, [9] * back + ids)
            case x if x < 0.2:
                delta.num_cached_tokens = 1
        found.append(Arrival(DECODE, at_s, delta))
        index += len(ids)
    match rng.randrange(6):
        case 0:
            found.append(Arrival(DECODE, at_s, lost="gone"))
        case 1:
            found.append(Arrival(DECODE, at_s, TokenDelta("r.1", index + 3, [4])))
        case 2:
            failed = TokenDelta("r.1", finish_reason=FinishReason.ERROR, error="x")
            found.append(Arrival(DECODE, at_s, failed))
        case _:
            last = TokenDelta("r.1", index, [7], timeline=Timeline())
            last.finish_reason = FinishReason.LENGTH
            found.append(Arrival(DECODE, at_s, last))
    if rng.random() < 0.3:
        # The decode worker is heard before the prefill worker.
        found.insert(rng.randrange(1, min(5, len(found)) + 1), found.pop(0))
    return found


@pytest.mark.parametrize("seed", range(80))
async def test_short_way_and_whole_way_give_the_client_the_same(seed):
    rng = random.Random(seed)
    arrivals, short, whole = arrivals_of(rng), Followed(TextStage), Followed(WholeWay)
    while arrivals:
        count = rng.randrange(1, 5)
        for one in (short, whole):
            one.follow(arrivals[:count])
        del arrivals[:count]
    assert short.seen() == whole.seen()
    assert len(short.flight.stream.token_ids) == short.flight.record.num_output_tokens
