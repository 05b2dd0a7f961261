"""A request on two workers at once, in every order in which their messages can come.

The dispatcher follows an attempt on scripted sessions, without network or time.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

import pytest

from baton.core.errors import WorkerLost
from baton.core.kv_layout import KvLayout
from baton.core.lifecycle import Timeline
from baton.core.request import (
    FinishReason,
    GenerateRequest,
    PeerRef,
    RequestId,
    SamplingParams,
    TokenDelta,
    Work,
)
from baton.core.worker_info import Role, WorkerInfo
from baton.telemetry.metrics import Metrics
from services.router.admission.admission_config import AdmissionConfig
from services.router.admission.admission_gate import AdmissionGate
from services.router.admission.admission_record import AdmissionRecorder
from services.router.admission.slo_config import SloConfig
from services.router.config import DispatchConfig, HealthConfig
from services.router.migration.handover import Handover, HandoverState, Trigger
from services.router.placement.perf_model import PerfModel
from services.router.placement.policy import Placement, PlacementKind, ScoreTerms
from services.router.requests.attempt import Attempt
from services.router.requests.dispatch import Dispatcher
from services.router.requests.failure_book import FailureBook
from services.router.requests.generation import GenerationInput
from services.router.requests.mailbox import Arrival, Mailbox
from services.router.requests.request_log import RequestRecorder
from services.router.requests.retry_config import BreakerConfig, RetryConfig
from services.router.shared.process_state import ProcessState
from services.router.tenants.quota import QuotaDesk

LAYOUT = KvLayout("m", 2, 1, 8, 16, "float32")
NUM_TOKENS = 12
HANDED_ON = 6
"""The old worker produces the tokens before this one."""


@dataclass
class ScriptedSession:
    """Stands in for WorkerSession: notes what it is told, delivers what the test says."""

    name: str
    live: dict[RequestId, object] = field(default_factory=dict)
    submitted: list[GenerateRequest] = field(default_factory=list)
    cancelled: list[RequestId] = field(default_factory=list)
    is_ready: bool = True

    @property
    def info(self) -> WorkerInfo:
        return WorkerInfo(
            self.name, "1", Role.DECODE, f"h:{self.name}", "m", LAYOUT, 10, 64, 4, "fake", 1
        )

    @property
    def peer_ref(self) -> PeerRef:
        return PeerRef(self.name, "1", f"h:{self.name}")

    def submit(self, request, mailbox, *, prefill_tokens, kv_tokens):
        if not self.is_ready:
            raise WorkerLost("gone")
        self.submitted.append(request)
        self.live[request.request_id] = mailbox

    def cancel(self, request_id, reason):
        self.live.pop(request_id, None)
        self.cancelled.append(request_id)

    def forget(self, request_id):
        self.live.pop(request_id, None)

    def is_running(self, request_id):
        return request_id in self.live

    def say(self, delta):
        """As the real one: nothing is delivered after the last word or a cancel."""
        mailbox = self.live.get("r.1")
        if mailbox is not None:
            if delta.finish_reason is not None or delta.timeline is not None:
                del self.live["r.1"]
            mailbox.put(Arrival(self.name, 0.0, delta), 0.0)

    def lose(self):
        self.is_ready = False
        mailbox = self.live.pop("r.1", None)
        if mailbox is not None:
            mailbox.put(Arrival(self.name, 0.0, lost=f"{self.name} is gone"), 0.0)


class NoWorkers:
    def sessions(self):
        return []


def idle_gate():
    """Admission that nobody enters."""
    slo = SloConfig()
    return AdmissionGate(
        choose=None, start=None, perf=PerfModel(), decoding=None, num_computing=None,
        config=AdmissionConfig(), slo=slo, worker_wait_s=1.0,
        recorder=AdmissionRecorder(Metrics(), slo), wall_clock=time.time,
    )  # fmt: skip


class ByteTokenizer:
    eos_token_ids = (0,)

    def detokenizer(self, prompt_ids=(), *, skip_special_tokens=True):
        return self

    def push(self, token_ids):
        return "x" * len(list(token_ids))

    def flush(self):
        return ""


class Following:
    """A dispatcher that follows one request, which d0 generates and d1 is asked to take over."""

    def __init__(self):
        self.dispatcher = Dispatcher(
            pool=NoWorkers(), starter=None, gate=idle_gate(),
            quotas=QuotaDesk(ProcessState(), expected_output_tokens=256),
            failures=FailureBook(RetryConfig(), BreakerConfig(), metrics=Metrics()),
            tokenizers={"m": ByteTokenizer()}, recorder=RequestRecorder(Metrics()),
            config=DispatchConfig(), health=HealthConfig(), rng=random.Random(0),
        )  # fmt: skip
        sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
        self.flight = self.dispatcher._open(GenerationInput("r", "m", (1, 2, 3), sampling))
        self.d0, self.d1 = ScriptedSession("d0"), ScriptedSession("d1")
        terms = ScoreTerms("d0", Role.DECODE, 0, 3, 0, 0, 0, 0, 0.0, 0.0)
        placement = Placement(PlacementKind.LOCAL_PREFILL, None, "d0", 0.0, "", (terms,))
        self.attempt = Attempt("r.1", placement, Mailbox(64, now_s=0.0))
        self.flight.attempt = self.attempt
        self.attempt.start(self.flight.order, [self.d0], 10.0)
        self.settled = []
        self.tokens = []
        self.is_finished = False

    def take_over(self):
        attempt = self.attempt
        handover = Handover(
            "d0", "d1", Trigger.DRAIN, 0.0, attempt.mailbox, attempt.unfinished, self.settled.append
        )
        self.flight.order.output_token_ids = self.flight.known_token_ids()
        attempt.take_over(self.flight.order, handover, self.d1, 10.0)
        self.flight.record.migrations.append(handover)
        return handover

    @property
    def is_over(self):
        """Finished, or given up to be placed anew."""
        return self.flight.attempt is None

    def read(self):
        """What the request's reader does with all that has arrived."""
        if self.is_over:
            return
        items, self.attempt.mailbox._items = self.attempt.mailbox._items, []
        deltas, error = self.dispatcher._follower.follow(self.flight, items)
        for delta in deltas:
            self.tokens += delta.token_ids
            self.is_finished = delta.finish_reason is not None
        if error is not None:
            raise error

    def close(self):
        self.dispatcher._close(self.flight)


@pytest.fixture
async def following():
    """On a running loop, which the dispatcher's timers need."""
    follower = Following()
    yield follower
    follower.close()


def token(index, finish=None):
    return TokenDelta("r.1", index, [100 + index], finish_reason=finish)


def error(message="broken"):
    return TokenDelta("r.1", finish_reason=FinishReason.ERROR, error=message, is_retryable=True)


def handed_on(index=HANDED_ON):
    return TokenDelta("r.1", index, timeline=Timeline())


OLD = [*map(token, range(HANDED_ON)), handed_on()]
NEW = [
    *map(token, range(HANDED_ON, NUM_TOKENS - 1)),
    token(NUM_TOKENS - 1, FinishReason.LENGTH),
]
ALL = [100 + index for index in range(NUM_TOKENS)]


def begin(following):
    following.d0.say(OLD[0])
    following.read()
    return following.take_over()


async def test_takeover_names_the_old_worker_and_what_is_known(following):
    following.d0.say(OLD[0])
    following.read()
    following.d0.say(OLD[1])
    following.take_over()
    (request,) = following.d1.submitted
    assert request.work is Work.TAKEOVER and request.kv_source == following.d0.peer_ref
    assert request.output_token_ids == (100, 101), "that which is still to be read included"
    assert following.attempt.is_moving and following.attempt.generator == "d0"


async def test_request_cannot_move_before_it_generates_nor_twice_at_once(following):
    assert not following.attempt.can_move
    begin(following)
    assert not following.attempt.can_move
    following.d1.say(NEW[0])
    following.read()
    assert not following.attempt.can_move, "the old worker's last word is still to come"
    for delta in OLD[1:]:
        following.d0.say(delta)
    following.read()
    assert following.attempt.can_move and following.attempt.generator == "d1"


async def test_takeover_by_a_lost_worker_changes_nothing(following):
    following.d0.say(OLD[0])
    following.read()
    following.d1.is_ready = False
    with pytest.raises(WorkerLost):
        following.take_over()
    assert following.attempt.can_move and following.attempt.handover is None


async def test_old_workers_loss_after_all_its_tokens_is_nothing(following):
    begin(following)
    for delta in OLD[1:-1]:
        following.d0.say(delta)
    following.d1.say(NEW[0])
    following.d0.lose()
    following.read()
    assert not following.is_over
    for delta in NEW[1:]:
        following.d1.say(delta)
    following.read()
    assert following.tokens == ALL and following.is_finished
    assert not following.flight.record.failures


@pytest.mark.parametrize("end", ["lose", "error"])
async def test_old_workers_end_with_tokens_missing_is_noticed_at_once(following, end):
    begin(following)
    for delta in NEW:
        following.d1.say(delta)
    following.read()
    assert following.attempt.waits_for == "d0"
    if end == "lose":
        following.d0.lose()
    else:
        following.d0.say(error())
    following.read()
    assert following.is_over and not following.is_finished
    assert following.flight.record.failures == ["d1: gap in the output positions"]


async def test_gap_of_the_old_worker_during_a_move_is_no_matter_of_the_new_one(following):
    begin(following)
    following.d0.say(token(2))
    following.read()
    assert following.is_over
    assert following.flight.record.failures == ["d0: gap in the output positions"]
    assert following.d1.cancelled == ["r.1"]


async def test_handed_on_to_a_worker_that_has_failed(following):
    begin(following)
    following.d1.say(error("no memory"))
    following.read()
    assert not following.is_over
    for delta in OLD[1:]:
        following.d0.say(delta)
    following.read()
    assert following.flight.record.failures == ["d1: handed on to d1, which failed: no memory"]


async def test_new_worker_that_is_silent_after_the_old_one_has_let_go(following):
    begin(following)
    for delta in OLD[1:]:
        following.d0.say(delta)
    following.read()
    following.attempt.give_up_move("late", at_s=0.0, now_s=5.0)
    following.read()
    assert following.is_over and following.flight.record.failures == ["d1: late"]
    assert "r.1" in following.d1.cancelled


async def test_given_up_move_is_not_offered_to_the_same_process_again(following):
    begin(following)
    following.attempt.give_up_move("late", at_s=0.0, now_s=5.0)
    assert following.attempt.silenced == {("d1", "1")} and following.attempt.can_move
    assert following.d1.cancelled == ["r.1"]


async def test_random_orders_and_losses(following):
    """Every token once and in order, whatever comes when; an end always; no end without need."""
    following.close()
    rng = random.Random(8)
    counts = dict.fromkeys(("finished", "given up", "kept"), 0)
    for _ in range(3000):
        walk = Following()
        handover = begin(walk)
        counts[_walk(walk, handover, rng)] += 1
        assert walk.tokens == ALL[: len(walk.tokens)]
        walk.close()
        assert not walk.d0.live and not walk.d1.live
        assert len(walk.settled) == 1
    assert min(counts.values()) > 200, counts


def _walk(walk, handover, rng):
    old, new = list(OLD[1:]), list(NEW)
    fails = rng.choice(("", "", "old", "new", "new before", "late"))
    if fails == "old":
        old = [*old[: rng.randrange(len(old))], rng.choice(("lose", error()))]
    elif fails == "new":
        new = [*new[: rng.randrange(1, len(new))], rng.choice(("lose", error()))]
    elif fails in ("new before", "late"):
        # The move fails, and the old worker goes on to the end.
        new = ["late" if fails == "late" else rng.choice(("lose", error()))]
        old = [*map(token, range(1, NUM_TOKENS - 1)), NEW[-1]]
    lost_all_tokens = fails == "old" and len(old) > HANDED_ON - 1
    while old or new:
        # The new worker starts once the old one has let go, whose news may still be on its way.
        stream, session = rng.choice(((old, walk.d0), (new, walk.d1)))
        if stream:
            what = stream.pop(0)
            if what == "lose":
                session.lose()
            elif what == "late":
                if handover.is_pending:
                    walk.attempt.give_up_move("late", at_s=0.0, now_s=1.0)
            else:
                session.say(what)
        if rng.random() < 0.5:
            walk.read()
    walk.read()
    assert walk.is_over, "neither finished nor given up"
    if fails in ("", "new before", "late"):
        assert walk.is_finished and not walk.flight.record.failures
    elif fails == "new":
        assert not walk.is_finished
    if walk.is_finished:
        assert walk.tokens == ALL
        assert lost_all_tokens or fails != "old"
        is_kept = handover.state is not HandoverState.MOVED
        return "kept" if is_kept else "finished"
    return "given up"
