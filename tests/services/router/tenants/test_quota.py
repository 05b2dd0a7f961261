"""Quotas of long prompts: asked before the text is made into tokens, exact afterwards."""

from __future__ import annotations

import asyncio
import random

import pytest

from baton.core.clock import ManualClock
from baton.core.errors import QuotaExceeded
from baton.core.request import RequestId, SamplingParams
from services.router.requests.generation import GenerationInput
from services.router.shared.process_state import ProcessState
from services.router.shared.state import QuotaLimits
from services.router.tenants.quota import QuotaDesk
from services.router.tenants.quota_hold import QuotaHold

LIMITS = QuotaLimits(requests_per_minute=2, tokens_per_minute=100, max_concurrent=1)


class Desk:
    """A desk over one process whose time stands still."""

    def __init__(self) -> None:
        self.state = ProcessState(clock=ManualClock())
        self.desk = QuotaDesk(self.state, expected_output_tokens=10)

    def request(self, num_prompt: int, hold: QuotaHold | None, limits: QuotaLimits = LIMITS):
        return GenerationInput(
            RequestId("r"), "m", (1,) * num_prompt, SamplingParams(max_tokens=10), tenant="acme",
            limits=limits, hold=hold,
        )  # fmt: skip

    async def left(self, limits: QuotaLimits = LIMITS) -> tuple[int | None, int | None, bool]:
        """Requests, tokens, and whether a slot is free; changes nothing."""
        answer = await self.state.take_quota("acme", limits=limits, num_tokens=0, num_requests=0)
        self.state.return_quota(answer.grant)
        return answer.remaining_requests, answer.remaining_tokens, answer.is_granted


@pytest.fixture
def at() -> Desk:
    return Desk()


async def test_hold_takes_a_request_and_the_slot_and_the_rest_comes_with_the_tokens(at):
    hold = await at.desk.hold("acme", LIMITS)
    assert await at.left() == (1, 99, False)
    grant = await at.desk.take(at.request(30, hold))
    assert await at.left() == (1, 60, False), "one request, and its tokens once"
    hold.release()
    assert await at.left() == (1, 60, False), "what is claimed is the request's own"
    at.desk.settle(grant, 25)
    assert await at.left() == (1, 75, True)


async def test_request_that_never_was_gives_everything_back(at):
    hold = await at.desk.hold("acme", LIMITS)
    hold.release()
    hold.release()
    assert await at.left() == (2, 100, True) and hold.claim() is None


async def test_refused_tokens_leave_nothing_taken(at):
    spent = await at.desk.take(at.request(80, None, QuotaLimits(tokens_per_minute=100)))
    hold = await at.desk.hold("acme", LIMITS)
    with pytest.raises(QuotaExceeded, match="this request counts 50 tokens") as refused:
        await at.desk.take(at.request(40, hold))
    assert refused.value.retry_after_s == pytest.approx(60 * 0.4)
    hold.release()
    at.desk.settle(spent, 0)
    assert await at.left() == (2, 100, True)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (QuotaLimits(requests_per_minute=1), "1 requests per minute"),
        (QuotaLimits(tokens_per_minute=20), "20 tokens per minute"),
        (QuotaLimits(max_concurrent=1), "1 requests at a time"),
    ],
)
async def test_hold_is_refused_where_nothing_is_left(at, limits, said):
    await at.desk.take(at.request(10, None, limits))
    with pytest.raises(QuotaExceeded, match=said) as refused:
        await at.desk.hold("acme", limits)
    assert refused.value.retry_after_s > 0 and "counts" not in str(refused.value)


async def test_nothing_is_held_without_limits(at):
    assert await at.desk.hold("acme", QuotaLimits()) is None


async def test_cancelled_while_the_tokens_are_taken(at, monkeypatch):
    hold = await at.desk.hold("acme", LIMITS)
    take = at.state.take_quota

    async def never(*args, **kwargs):
        await asyncio.sleep(60)

    monkeypatch.setattr(at.state, "take_quota", never)
    taking = asyncio.create_task(at.desk.take(at.request(5, hold)))
    await asyncio.sleep(0)
    taking.cancel()
    await asyncio.gather(taking, return_exceptions=True)
    monkeypatch.setattr(at.state, "take_quota", take)
    hold.release()
    assert await at.left() == (2, 100, True)


@pytest.mark.parametrize("seed", range(5))
async def test_random_requests_leave_the_quota_as_it_was(at, seed):
    rng = random.Random(seed)
    limits = QuotaLimits(requests_per_minute=50, tokens_per_minute=1000, max_concurrent=5)
    holds, grants, num_requests = [], [], 0
    for _ in range(2000):
        match rng.choice(("hold", "release", "take", "take whole", "end")):
            case "hold":
                try:
                    holds.append(await at.desk.hold("acme", limits))
                except QuotaExceeded:
                    continue
            case "release" if holds:
                holds.pop(rng.randrange(len(holds))).release()
            case "take" | "take whole" as how:
                hold = holds.pop() if holds and how == "take" else None
                try:
                    request = at.request(rng.randrange(1, 400), hold, limits)
                    grants.append(await at.desk.take(request))
                    num_requests += 1
                except QuotaExceeded:
                    continue
                finally:
                    if hold is not None:
                        hold.release()
            case "end" if grants:
                at.desk.settle(grants.pop(rng.randrange(len(grants))), 0)
        num_tokens = len(holds) + sum(grant.num_tokens for grant in grants)
        assert await at.left(limits) == (
            50 - num_requests - len(holds),
            1000 - num_tokens,
            len(holds) + len(grants) < 5,
        )
    for hold in holds:
        hold.release()
    for grant in grants:
        at.desk.settle(grant, 0)
    assert await at.left(limits) == (50 - num_requests, 1000, True)
