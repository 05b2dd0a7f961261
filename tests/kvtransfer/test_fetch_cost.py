"""The cost rule: right at known points, and monotonic in everything it is given."""

from __future__ import annotations

import itertools

import pytest

from kvtransfer.fetch_cost import (
    DEFAULT_LINK,
    DEFAULT_PREFILL,
    EXCHANGE_S,
    LinkSpeed,
    PrefillSpeed,
    compute_seconds,
    fetch_pays,
    fetch_seconds,
    num_blocks_worth_fetching,
)

BANDWIDTHS = [1e6, 1e7, 1e8, 1e9, 1e10, 4e11]
LATENCIES_S = [0.0, 1e-5, 1e-3, 0.1, 10.0]
RATES_S = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2]
PAIR_RATES_S = [0.0, 1e-10, 1e-8]
NUM_BLOCKS = [0, 1, 2, 3, 10, 100, 1000]
CONTEXTS = [0, 100, 10_000]
BLOCK_SIZE, BLOCK_BYTES = 16, 16 * 23_040


def worth(
    num_blocks: int,
    *,
    bandwidth: float = 1e9,
    latency_s: float = 1e-3,
    rate_s: float = 1e-4,
    pair_rate_s: float = 0.0,
    context: int = 0,
    block_bytes: int = BLOCK_BYTES,
) -> int:
    return num_blocks_worth_fetching(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        block_bytes=block_bytes,
        link=LinkSpeed(bandwidth, latency_s),
        prefill=PrefillSpeed(rate_s, pair_rate_s),
        num_context_tokens=context,
    )


def test_times_of_both_sides_by_hand():
    assert fetch_seconds(3_000_000, LinkSpeed(1e9, 0.5)) == pytest.approx(EXCHANGE_S + 0.503)
    assert compute_seconds(100, PrefillSpeed(0.01)) == pytest.approx(1.0)
    # Each of 100 tokens attends to 200 others and, on average, to half of the hundred.
    attended = compute_seconds(100, PrefillSpeed(0.01, 1e-6), num_context_tokens=200)
    assert attended == pytest.approx(1.0 + 100 * 250 * 1e-6)


def test_slow_link_is_not_worth_it_and_fast_one_is():
    # 1,600 tokens: 160 ms to compute, 36.9 MB to move.
    assert worth(100, bandwidth=1e9) == 100
    assert worth(100, bandwidth=1e8) == 0


def test_a_few_blocks_do_not_pay_for_the_exchange():
    assert worth(1, bandwidth=4e11, latency_s=0.0) == 0
    assert worth(2, bandwidth=4e11, latency_s=0.0) == 2
    assert worth(0) == 0


def test_long_context_makes_computing_dearer():
    assert worth(100, bandwidth=2e8) == 0
    assert worth(100, bandwidth=2e8, pair_rate_s=1e-8, context=10_000) == 100


def test_the_answer_is_all_or_nothing_because_more_saves_more():
    for bandwidth, latency_s, rate_s, pair_rate_s, context in itertools.product(
        BANDWIDTHS, LATENCIES_S, RATES_S, PAIR_RATES_S, CONTEXTS
    ):
        link, prefill = LinkSpeed(bandwidth, latency_s), PrefillSpeed(rate_s, pair_rate_s)
        saved = [
            compute_seconds(n * BLOCK_SIZE, prefill, num_context_tokens=context)
            - fetch_seconds(n * BLOCK_BYTES, link)
            for n in range(1, 200)
        ]
        best = max(saved)
        if best > 0:
            assert saved[-1] == pytest.approx(best)


@pytest.mark.parametrize("num_blocks", NUM_BLOCKS)
def test_monotonic_in_every_measurement(num_blocks):
    for bandwidth, latency_s, rate_s, pair_rate_s, context in itertools.product(
        BANDWIDTHS, LATENCIES_S, RATES_S, PAIR_RATES_S, CONTEXTS
    ):
        values = {
            "bandwidth": bandwidth,
            "latency_s": latency_s,
            "rate_s": rate_s,
            "pair_rate_s": pair_rate_s,
            "context": context,
        }
        fetched = worth(num_blocks, **values)
        assert fetched in (0, num_blocks)
        better = [
            {"bandwidth": bandwidth * 3},
            {"latency_s": latency_s / 3},
            {"rate_s": rate_s * 3},
            {"pair_rate_s": pair_rate_s * 3 + 1e-10},
            {"context": context * 3 + 10},
            {"block_bytes": BLOCK_BYTES // 3},
        ]
        for change in better:
            assert worth(num_blocks, **{**values, **change}) >= fetched, change


def test_more_blocks_never_turn_a_yes_into_a_no():
    for bandwidth, latency_s, rate_s, context in itertools.product(
        BANDWIDTHS, LATENCIES_S, RATES_S, CONTEXTS
    ):
        answers = [
            worth(n, bandwidth=bandwidth, latency_s=latency_s, rate_s=rate_s, context=context) > 0
            for n in NUM_BLOCKS
        ]
        assert answers == sorted(answers)


def test_what_is_not_measured_counts_as_stated():
    def answer(**speeds: object) -> int:
        return num_blocks_worth_fetching(
            num_blocks=64, block_size=BLOCK_SIZE, block_bytes=BLOCK_BYTES, **speeds
        )

    assert answer() == answer(link=DEFAULT_LINK, prefill=DEFAULT_PREFILL)
    assert answer(link=LinkSpeed(0.0)) == answer(link=DEFAULT_LINK)


@pytest.mark.parametrize("seconds_per_token", [None, 1e-6, 1e-3])
@pytest.mark.parametrize("bytes_per_second", [None, 0.0, 1e8, 1e11])
@pytest.mark.parametrize("latency_s", [None, 0.01])
def test_plain_numbers_give_the_same_answer(seconds_per_token, bytes_per_second, latency_s):
    link = None if bytes_per_second is None else LinkSpeed(bytes_per_second, latency_s or 0.0)
    prefill = None if seconds_per_token is None else PrefillSpeed(seconds_per_token)
    for num_blocks in NUM_BLOCKS[1:]:
        pays = fetch_pays(
            num_tokens=num_blocks * BLOCK_SIZE,
            num_bytes=num_blocks * BLOCK_BYTES,
            seconds_per_token=seconds_per_token,
            bytes_per_second=bytes_per_second,
            latency_s=latency_s,
        )
        worth_it = num_blocks_worth_fetching(
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            block_bytes=BLOCK_BYTES,
            link=link,
            prefill=prefill,
        )
        assert pays == (worth_it > 0)
