"""Whole runs against a server whose answers and faults are known."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from baton.core.errors import ConfigError, InternalError, NotFound, Unavailable
from baton.loadtest.openai_target import HttpOptions, Route
from baton.loadtest.options import LoadOptions, Targets
from baton.loadtest.pacing import at_rate
from baton.loadtest.result import LoadResult
from baton.loadtest.runner import LoadRunner
from baton.loadtest.workload import MadeUp, SharedPrefixes, Turns
from baton.simulator.arrivals import RequestLengths
from fake_openai import FakeOpenAi, Fault

Load = Callable[..., Awaitable[LoadResult]]
PROBES = 2
LENGTHS = (RequestLengths(40, 8),)


async def test_a_closed_loop_keeps_its_concurrency_and_counts_what_the_server_counts(
    fake: FakeOpenAi, load: Load
) -> None:
    fake.gap_s, fake.cached_tokens = 0.002, 10
    result = await load(LoadOptions(num_requests=30, concurrency=4))
    figures = result.figures
    assert (figures.num_sent, figures.num_ok, figures.num_given_up) == (30, 30, 0)
    assert figures.num_prompt_tokens == 30 * 40
    assert figures.num_output_tokens == 30 * 8
    assert figures.num_wrong_length == 0
    assert figures.cached_share == 10 / 40
    assert figures.max_in_flight == fake.max_at_a_time == 4
    # The probes' connection is used again.
    assert fake.num_connections <= 1 + 4
    latencies = figures.latencies
    assert latencies.ttft_s is not None and latencies.ttft_s.count == 30
    assert latencies.gap_s is not None and latencies.gap_s.count == 30 * 7
    assert result.generator.lag_p99_s is None


async def test_an_open_loop_sends_by_its_clock_whatever_the_answers(
    fake: FakeOpenAi, load: Load
) -> None:
    fake.first_s = 0.3
    options = LoadOptions(num_requests=10, rate_per_s=50, burstiness=0, seed=3)
    made = MadeUp(LENGTHS)
    paced = at_rate(made.conversations(3), 50, 0, 3)
    result = await load(options, conversations=paced)
    assert [o.planned_s for o in result.outcomes] == pytest.approx([i / 50 for i in range(10)])
    assert all((o.lag_s or 0) >= -0.002 for o in result.outcomes)
    assert fake.max_at_a_time > 5
    assert result.figures.num_ok == 10
    assert result.generator.lag_max_s is not None


@pytest.mark.parametrize(
    ("fault", "label"),
    [
        (Fault.REFUSE, "refused 429"),
        (Fault.CUT, "cut_off"),
        (Fault.DROP, "connect"),
        (Fault.ERROR_EVENT, "stream_error lost"),
        (Fault.GARBAGE_EVENT, "malformed"),
        (Fault.NOT_HTTP, "malformed"),
        (Fault.NO_STREAM, "malformed"),
        (Fault.HANG, "timeout"),
    ],
)
async def test_each_fault_is_counted_by_its_kind_and_the_run_goes_on(
    fake: FakeOpenAi, load: Load, fault: Fault, label: str
) -> None:
    # A connection that was kept alive may have been closed meanwhile, so a drop is tried again.
    at = (PROBES + 2, PROBES + 3) if fault is Fault.DROP else (PROBES + 2,)
    fake.fault_of = lambda number: fault if number in at else Fault.NONE
    http = HttpOptions("", timeout_s=0.5)
    result = await load(LoadOptions(num_requests=6, concurrency=1), http=http)
    assert [(e.label, e.count) for e in result.figures.errors] == [(label, 1)]
    assert result.figures.num_ok == 5
    assert result.figures.attainment.all == pytest.approx(5 / 6)


async def test_a_server_that_closes_idle_connections_fails_nobody(
    fake: FakeOpenAi, load: Load
) -> None:
    fake.closes = True
    result = await load(LoadOptions(num_requests=10, concurrency=2))
    assert result.figures.num_ok == 10


async def test_requests_that_miss_targets_are_no_goodput(fake: FakeOpenAi, load: Load) -> None:
    fake.first_s = 0.05
    result = await load(
        LoadOptions(num_requests=6, concurrency=2), targets=Targets(ttft_s=0.01, itl_s=5)
    )
    shares = result.figures.attainment
    assert (shares.ttft, shares.itl, shares.e2e, shares.all) == (0.0, 1.0, None, 0.0)
    assert shares.goodput_per_s == 0.0
    assert not result.is_kept


async def test_turns_repeat_what_was_said_in_the_servers_own_words(
    fake: FakeOpenAi, load: Load
) -> None:
    made = MadeUp(LENGTHS, turns=Turns(3, 3))
    await load(LoadOptions(num_requests=3, concurrency=1), workload=made)
    turns = [r["messages"] for r in fake.requests[PROBES:]]
    assert [len(messages) for messages in turns] == [1, 3, 5]
    assert turns[2][:3] == turns[1]
    assert turns[1][1] == {"role": "assistant", "content": "first " + "word " * 7}
    sessions = {h["x-session-id"] for h in fake.headers[PROBES:]}
    assert len(sessions) == 1
    assert len({h["x-request-id"] for h in fake.headers}) == len(fake.headers)


async def test_shared_prefixes_are_shared_and_the_rest_is_not(fake: FakeOpenAi, load: Load) -> None:
    made = MadeUp(LENGTHS, prefixes=SharedPrefixes(100, 2))
    await load(LoadOptions(num_requests=20, concurrency=2), workload=made)
    texts = [r["messages"][0]["content"].split() for r in fake.requests[PROBES:]]
    assert {len(t) for t in texts} == {100 + 40 - 7}
    assert len({tuple(t[: 100 - 7]) for t in texts}) == 2
    assert len({tuple(t[100 - 7 :]) for t in texts}) == 20


@pytest.mark.parametrize("tokens_per_word", [1, 5])
async def test_lengths_are_kept_whatever_a_word_costs(
    fake: FakeOpenAi, load: Load, tokens_per_word: int
) -> None:
    fake.tokens_per_word = tokens_per_word
    result = await load(
        LoadOptions(num_requests=4, concurrency=2), workload=MadeUp((RequestLengths(402, 2),))
    )
    for outcome in result.outcomes:
        assert outcome.num_prompt_tokens is not None
        assert abs(outcome.num_prompt_tokens - 402) < tokens_per_word


async def test_token_ids_need_no_words(fake: FakeOpenAi, load: Load) -> None:
    http = HttpOptions("", route=Route.COMPLETIONS)
    result = await load(LoadOptions(num_requests=3, concurrency=1), http=http, vocab_size=800)
    assert [len(r["prompt"]) for r in fake.requests] == [40] * 3
    assert all(100 <= i < 800 for r in fake.requests for i in r["prompt"])
    assert result.figures.num_prompt_tokens == 120


async def test_answers_that_are_not_streamed_have_no_first_token(
    fake: FakeOpenAi, load: Load
) -> None:
    http = HttpOptions("", is_streaming=False, extra={"temperature": 1})
    result = await load(LoadOptions(num_requests=4, concurrency=2), http=http)
    latencies = result.figures.latencies
    assert latencies.ttft_s is None and latencies.gap_s is None
    assert latencies.e2e_s is not None and latencies.e2e_s.count == 4
    assert result.figures.num_output_tokens == 32
    assert fake.requests[0]["temperature"] == 1


async def test_the_time_limit_ends_a_run_and_begun_requests_finish(
    fake: FakeOpenAi, load: Load
) -> None:
    fake.gap_s = 0.01
    result = await load(LoadOptions(num_requests=10_000, duration_s=0.3, concurrency=3))
    assert 3 <= result.figures.num_ok < 1000
    assert result.figures.num_ok == result.figures.num_sent
    assert max(o.sent_s for o in result.outcomes) <= 0.3


async def test_nobody_thinks_beyond_the_time_limit(fake: FakeOpenAi, load: Load) -> None:
    made = MadeUp(LENGTHS, turns=Turns(2, 2, think_s=1000.0))
    result = await load(
        LoadOptions(num_requests=1000, duration_s=0.3, concurrency=2), workload=made
    )
    assert result.figures.num_ok == 2


@pytest.mark.parametrize("is_open", [True, False])
async def test_a_defect_of_ours_ends_the_run_with_its_reason(
    load: Load, is_open: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(LoadRunner, "_send", broken)
    loop = {"rate_per_s": 50.0} if is_open else {"concurrency": 2}
    conversations = at_rate(MadeUp(LENGTHS).conversations(0), 50, 1, 0) if is_open else None
    with pytest.raises(ZeroDivisionError):
        await load(LoadOptions(**loop), conversations=conversations)


async def test_a_stopped_run_tells_what_there_was_and_leaves_nothing_under_way(
    fake: FakeOpenAi, load: Load
) -> None:
    fake.gap_s = 0.02

    def stop_soon(runner: LoadRunner) -> None:
        asyncio.get_running_loop().call_later(0.4, runner.stop)

    result = await load(LoadOptions(num_requests=10_000, concurrency=4), on_start=stop_soon)
    assert result.is_stopped
    assert result.figures.num_given_up == 4
    assert result.figures.num_ok == result.figures.num_sent > 0
    assert not result.figures.errors


async def test_what_is_due_beyond_the_limit_in_flight_is_told_not_delayed(
    fake: FakeOpenAi, load: Load
) -> None:
    fake.first_s = 0.5
    paced = at_rate(MadeUp(LENGTHS).conversations(0), 200, 0, 0)
    options = LoadOptions(num_requests=10, rate_per_s=200, max_in_flight=4)
    result = await load(options, conversations=paced)
    assert [(e.label, e.count) for e in result.figures.errors] == [("not_sent", 6)]
    assert fake.max_at_a_time == 4


async def test_a_server_that_comes_up_is_waited_for(fake: FakeOpenAi, load: Load) -> None:
    fake.not_yet = 2
    result = await load(LoadOptions(num_requests=1, concurrency=1), wait_s=10)
    assert result.model == "fake"


async def test_a_wrong_model_is_told_with_those_that_are_served(load: Load) -> None:
    with pytest.raises(NotFound, match="does not serve 'other'; it serves fake"):
        await load(LoadOptions(concurrency=1), model="other")


async def test_nothing_is_waited_for_longer_than_asked(fake: FakeOpenAi, load: Load) -> None:
    fake.not_yet = 1000
    with pytest.raises(Unavailable, match=r"serves no model yet.*waited 0 s.*--wait"):
        await load(LoadOptions(concurrency=1))


async def test_first_requests_that_fail_end_the_run_before_it_begins(
    fake: FakeOpenAi, load: Load
) -> None:
    fake.fault_of = lambda number: Fault.REFUSE
    with pytest.raises(ConfigError, match=r"first request .* was not answered: refused 429: too"):
        await load(LoadOptions(concurrency=1))
    fake.fault_of = lambda number: Fault.NO_USAGE
    with pytest.raises(InternalError, match="does not tell the tokens of a prompt"):
        await load(LoadOptions(concurrency=1))
    fake.fault_of, fake.tokens_per_word = (lambda number: Fault.NONE), 0
    with pytest.raises(InternalError, match="does not count prompts"):
        await load(LoadOptions(concurrency=1))
