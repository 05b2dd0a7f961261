"""The sampling kernels against plain torch: same records, same logits, same tokens."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

import kernels.sampling_threshold
from kernels.sampling import sample
from kernels.sampling_counts import count_tokens, count_tokens_reference
from kernels.sampling_reference import adjusted_scores, kept_weights, sample_reference
from kernels.sampling_rows import (
    MAX_TOP_LOGPROBS,
    PROMPT_BIT,
    ROW_DTYPE,
    STOP_BIT,
    RowFlag,
    SampledRows,
    SamplingPath,
    SamplingState,
    SamplingWorkspace,
)

MAX_EDITS = 300
FULL = SamplingPath(is_full=True, draws=True, filters=True, top_logprobs=True)
POISON = 0x7FC0DEAD
# Sums over the vocabulary in float32, in another order than float64's.
LOGPROB_TOLERANCE = 2e-5
# Of the cumulative share of a token: a threshold or an edge that differs by a token of 1e-6.
EDGE_TOLERANCE = 1e-5
# The lowest float32 times a repetition penalty is infinite before it is clamped.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def records_of(num_rows: int, **fields: object) -> np.ndarray:
    """Rows that draw from the whole vocabulary, each in its own slot, but for `fields`."""
    records = np.zeros(num_rows, dtype=ROW_DTYPE)
    defaults = {
        "slot": np.arange(num_rows),
        "flags": int(RowFlag.DRAWS),
        "temperature": 1.0,
        "min_p_distance": np.inf,
        "repetition_penalty": 1.0,
        "top_p": 1.0,
        "random": np.linspace(0, 2.0**63, num_rows).astype(np.uint64) * 2 & ~np.uint64(0x7FF),
    }
    for name, value in (defaults | fields).items():
        records[name] = value
    return records


def random_records(num_rows: int, vocab_size: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    flags = rng.integers(0, 128, num_rows)
    flags &= ~int(RowFlag.FILTERS | RowFlag.ADJUSTS)
    top_k = rng.choice([0, 1, 7, max(vocab_size - 1, 0), 5 * vocab_size], num_rows)
    top_p = rng.choice([1.0, 1e-6, 0.3, 0.9, 0.999], num_rows)
    is_filtered = ((top_k > 0) | (top_p < 1.0)) & (flags & int(RowFlag.DRAWS) != 0)
    flags |= np.where(is_filtered, int(RowFlag.FILTERS), 0)
    adjusting = int(RowFlag.COUNTS | RowFlag.MASKS_STOPS | RowFlag.GRAMMAR)
    flags |= np.where(flags & adjusting, int(RowFlag.ADJUSTS), 0)
    slots = rng.permutation(num_rows)
    slots[rng.random(num_rows) < 0.1] = -1
    return records_of(
        num_rows,
        slot=slots,
        flags=flags,
        temperature=rng.choice([0.1, 1.0, 3.0, 100.0], num_rows),
        min_p_distance=rng.choice([np.inf, 0.0, 2.0], num_rows),
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=rng.choice([1.0, 1.5, 0.01], num_rows),
        frequency_penalty=rng.choice([0.0, 0.4], num_rows),
        presence_penalty=rng.choice([0.0, -1.1], num_rows),
        random=rng.integers(0, 2**64, num_rows, dtype=np.uint64) & ~np.uint64(0x7FF),
        num_edits=rng.integers(0, min(vocab_size, MAX_EDITS) + 1, num_rows),
        num_top=rng.integers(0, min(vocab_size, 20) + 1, num_rows)
        * (flags & int(RowFlag.LOGPROBS) != 0),
    )


def state_of(records: np.ndarray, vocab_size: int, device: torch.device) -> SamplingState:
    """With random counts, biases, stops and allowed tokens."""
    num_rows = len(records)
    state = SamplingState.allocate(vocab_size, num_rows, num_rows, MAX_EDITS, device)
    rng = np.random.default_rng(len(records))
    state.rows.copy_(torch.from_numpy(records.view(np.int32).reshape(num_rows, -1)))
    counts = rng.integers(0, 3, (num_rows, vocab_size)) * rng.integers(0, 2, vocab_size)
    counts = counts | PROMPT_BIT * rng.integers(0, 2, (num_rows, vocab_size))
    state.token_counts.copy_(torch.from_numpy(counts.astype(np.int32)))
    num_edits = min(vocab_size, MAX_EDITS)
    for slot in range(num_rows):
        tokens = rng.permutation(vocab_size)[:num_edits] | STOP_BIT * rng.integers(0, 2, num_edits)
        state.edit_tokens[slot, :num_edits] = torch.from_numpy(tokens.astype(np.int32))
    state.edit_biases.copy_(torch.from_numpy(rng.normal(size=(num_rows, MAX_EDITS))))
    words = rng.integers(-(2**31), 2**31, tuple(state.allowed_tokens.shape))
    state.allowed_tokens.copy_(torch.from_numpy(words.astype(np.int32)))
    return state


def poisoned_workspace(state: SamplingState, block: int) -> SamplingWorkspace:
    num_rows, vocab_size = state.token_counts.shape
    workspace = SamplingWorkspace.allocate(vocab_size, num_rows, state.rows.device, block)
    for field in dataclasses.fields(workspace):
        value = getattr(workspace, field.name)
        if isinstance(value, Tensor):
            value.fill_(float("nan") if value.is_floating_point() else POISON)
    return workspace


def copy_of(state: SamplingState) -> SamplingState:
    return SamplingState(
        **{f.name: getattr(state, f.name).clone() for f in dataclasses.fields(state)}
    )


@dataclasses.dataclass
class Outcome:
    out: SampledRows
    last_tokens: Tensor
    token_counts: Tensor


def run(
    logits: Tensor,
    state: SamplingState,
    *,
    block: int = 256,
    path: SamplingPath = FULL,
    launch_pdl: bool = False,
) -> Outcome:
    state, num_rows = copy_of(state), logits.shape[0]
    out = SampledRows.allocate(num_rows, logits.device)
    out.token_ids.fill_(-1)
    last_tokens = torch.full((state.token_counts.shape[0],), -1, device=logits.device)
    sample(
        logits,
        state=state,
        workspace=poisoned_workspace(state, block),
        path=path,
        last_tokens=last_tokens,
        out=out,
        launch_pdl=launch_pdl,
    )
    return Outcome(out, last_tokens, state.token_counts)


def run_reference(logits: Tensor, state: SamplingState) -> Outcome:
    state = copy_of(state)
    out = SampledRows.allocate(logits.shape[0], logits.device)
    last_tokens = torch.full((state.token_counts.shape[0],), -1, device=logits.device)
    sample_reference(logits, state=state, last_tokens=last_tokens, out=out)
    return Outcome(out, last_tokens, state.token_counts)


def assert_same(actual: Outcome, expected: Outcome, *, exact_logprobs: bool = False) -> None:
    assert actual.out.token_ids.tolist() == expected.out.token_ids.tolist()
    assert actual.last_tokens.tolist() == expected.last_tokens.tolist()
    assert torch.equal(actual.token_counts, expected.token_counts)
    assert torch.equal(actual.out.top_ids, expected.out.top_ids)
    tolerance = 0.0 if exact_logprobs else LOGPROB_TOLERANCE
    for name in ("logprobs", "top_logprobs"):
        a, e = getattr(actual.out, name), getattr(expected.out, name)
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def randn(num_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(vocab_size)
    return (torch.randn(num_rows, vocab_size, generator=generator) * 2).to(device, dtype)


@pytest.mark.parametrize(
    ("vocab_size", "num_rows", "dtype", "block"),
    [
        (1, 6, torch.float32, 16),
        (63, 12, torch.bfloat16, 64),
        (1000, 16, torch.float32, 512),
        (1000, 6, torch.float16, 1024),
        (5000, 2, torch.bfloat16, 4096),
    ],
)
def test_random_rows_equal_the_reference(
    vocab_size: int, num_rows: int, dtype: torch.dtype, block: int, device: torch.device
) -> None:
    records = random_records(num_rows, vocab_size, seed=vocab_size + num_rows)
    state = state_of(records, vocab_size, device)
    logits = randn(num_rows, vocab_size, dtype, device)
    before = logits.clone()
    first = run(logits, state, block=block)
    assert_same(first, run_reference(logits, state))
    assert_same(run(logits, state, block=block), first, exact_logprobs=True)
    assert torch.equal(logits, before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_rows", [1, 8, 256])
@pytest.mark.parametrize("vocab_size", [1, 63, 1000, 32000, 49152, 128256, 152064])
def test_random_rows_at_serving_shapes(
    vocab_size: int, num_rows: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Among so many tokens a number may fall on an edge that float32's exp moves a little."""
    records = random_records(num_rows, vocab_size, seed=vocab_size + num_rows)
    state = state_of(records, vocab_size, device)
    logits = randn(num_rows, vocab_size, dtype, device)
    first = run(logits, state, block=4096, launch_pdl=True)
    assert_same(run(logits, state, block=4096), first, exact_logprobs=True)
    expected = run_reference(logits, state)
    for index in range(num_rows):
        token, wanted = int(first.out.token_ids[index]), int(expected.out.token_ids[index])
        if token == wanted:
            continue
        assert records["flags"][index] & int(RowFlag.DRAWS)
        scores = adjusted_scores(logits[index].float(), records[index], index, state)
        weights = kept_weights(scores, records[index])
        share_up_to = weights.cumsum(-1) / weights.sum()
        number = int(records["random"][index]) * 2.0**-64
        assert abs(float(share_up_to[min(token, wanted)]) - number) < EDGE_TOLERANCE
    has_logprobs = records["flags"] & int(RowFlag.LOGPROBS) != 0
    same = first.out.token_ids.eq(expected.out.token_ids).cpu() & torch.from_numpy(has_logprobs)
    torch.testing.assert_close(
        first.out.logprobs.cpu()[same],
        expected.out.logprobs.cpu()[same],
        rtol=LOGPROB_TOLERANCE,
        atol=LOGPROB_TOLERANCE,
    )
    assert torch.equal(first.out.top_ids, expected.out.top_ids)


def test_greedy_rows_need_nothing_but_the_logits(device: torch.device) -> None:
    state = state_of(records_of(4, flags=0, slot=[2, -1, 0, 1]), 700, device)
    logits = randn(4, 700, torch.bfloat16, device)
    logits[0, [300, 301, 690]] = 100.0
    outcome = run(logits, state, path=SamplingPath(is_full=False))
    assert_same(outcome, run_reference(logits, state))
    assert outcome.out.token_ids[0] == 300
    assert outcome.last_tokens.tolist()[3] == -1


def test_rows_may_be_strided_and_of_either_index_type(device: torch.device) -> None:
    state = state_of(records_of(3, top_k=5, flags=int(RowFlag.DRAWS | RowFlag.FILTERS)), 90, device)
    wide = randn(6, 190, torch.float32, device)
    logits = wide[::2, 17:107]
    assert_same(run(logits, state), run_reference(logits, state))


def test_a_row_does_not_depend_on_its_batch_or_how_it_is_cut(device: torch.device) -> None:
    vocab_size, num_rows = 900, 6
    records = random_records(num_rows, vocab_size, seed=5)
    records["slot"] = np.arange(num_rows)
    state = state_of(records, vocab_size, device)
    logits = randn(num_rows, vocab_size, torch.float32, device)
    together = run(logits, state, block=128)
    coarse = run(logits, state, block=1024)
    assert coarse.out.token_ids.tolist() == together.out.token_ids.tolist()
    assert torch.equal(coarse.out.top_ids, together.out.top_ids)
    for row in (1, 4):
        alone = copy_of(state)
        alone.rows[0] = state.rows[row]
        alone.allowed_tokens[0] = state.allowed_tokens[row]
        outcome = run(logits[row : row + 1], alone, block=128)
        assert outcome.out.token_ids[0] == together.out.token_ids[row]
        assert outcome.out.logprobs[0] == together.out.logprobs[row]


@pytest.mark.parametrize("capacity", [16, 16384])
def test_thresholds_keep_ties_and_survive_too_many_candidates(
    capacity: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal logits, two values, a smooth slope, and one peak; with and without the short cut."""
    monkeypatch.setattr(kernels.sampling_threshold, "CANDIDATE_CAPACITY", capacity)
    vocab_size = 500
    shapes = torch.zeros(4, vocab_size)
    shapes[1, 100:] = -1.0
    shapes[2] = torch.linspace(0, -0.01, vocab_size)
    shapes[3] = torch.linspace(0, -600.0, vocab_size)
    cases = [(0, 0.5), (3, 1.0), (90, 1.0), (101, 1.0), (0, 0.2), (250, 0.6), (499, 0.999)]
    rows = [(shape, k, p, u) for shape in shapes for k, p in cases for u in (0.0, 1 - 2**-30)]
    records = records_of(
        len(rows),
        flags=int(RowFlag.DRAWS | RowFlag.FILTERS),
        top_k=[k for _, k, _, _ in rows],
        top_p=[p for _, _, p, _ in rows],
        random=[int(u * 2**53) << 11 for _, _, _, u in rows],
    )
    logits = torch.stack([shape for shape, _, _, _ in rows]).to(device)
    state = state_of(records, vocab_size, device)
    outcome = run(logits, state, block=512)
    assert_same(outcome, run_reference(logits, state))
    last = outcome.out.token_ids.tolist()[1::2]
    # All equal: every token is a tie of the last that stays.
    assert last[:7] == [499] * 7
    # 100 tokens at 0, 400 at -1: the 90th and a fifth of the mass are among the first.
    assert last[8:10] == [99, 99]
    assert last[10] == 499


def test_impossible_and_extreme_logits(device: torch.device) -> None:
    inf = float("inf")
    logits = torch.zeros(8, 40)
    logits[0] = -inf
    logits[1] = -inf
    logits[2, 1:] = -inf
    logits[3, 7] = inf
    logits[4] = 3e38
    logits[4, 5:] = -3e38
    logits[5, :39] = float("nan")
    logits[6] = float("nan")
    logits[7] = -3.4e38
    flags = [0] + [int(RowFlag.DRAWS)] * 7
    state = state_of(records_of(8, flags=flags, temperature=0.5), 40, device)
    tokens = run(logits.to(device), state, block=16).out.token_ids.tolist()
    assert tokens == run_reference(logits.to(device), state).out.token_ids.tolist()
    assert tokens[:4] == [0, 39, 0, 7]
    assert tokens[4] < 5
    assert tokens[5:7] == [39, 39]


def test_draws_invert_the_distribution(device: torch.device) -> None:
    """Evenly spaced numbers give every token its share to within one draw."""
    num_rows, vocab_size = 96, 12
    shares = torch.arange(vocab_size) / (vocab_size * (vocab_size - 1) / 2)
    logits = shares.log().to(device).expand(num_rows, -1)
    spaced = [((2 * i + 1) << 63) // num_rows & ~0x7FF for i in range(num_rows)]
    state = state_of(records_of(num_rows, random=np.array(spaced, np.uint64)), vocab_size, device)
    path = SamplingPath(is_full=True, draws=True)
    tokens = run(logits, state, block=16, path=path).out.token_ids
    counts = torch.bincount(tokens.cpu(), minlength=vocab_size)
    assert tokens.tolist() == sorted(tokens.tolist())
    assert (counts - shares * num_rows).abs().max() <= 1.0


def test_gumbel_noise_is_a_function_of_number_and_token(device: torch.device) -> None:
    records = records_of(12, flags=int(RowFlag.GUMBEL), temperature=0.7)
    state = state_of(records, 300, device)
    logits = randn(12, 300, torch.float32, device)
    path = SamplingPath(is_full=True, gumbel=True)
    outcome = run(logits, state, block=128, path=path)
    assert_same(outcome, run_reference(logits, state))
    assert len(set(outcome.out.token_ids.tolist())) > 6


@pytest.mark.gpu
@pytest.mark.parametrize("gumbel", [False, True])
def test_draws_pass_chi_square(gumbel: bool, device: torch.device) -> None:
    """A million draws over 50 tokens, 49 degrees of freedom, limit at one in 1,000."""
    num_rows, vocab_size = 10_000, 50
    logits = randn(1, vocab_size, torch.float32, device).expand(num_rows, -1)
    flag = RowFlag.GUMBEL if gumbel else RowFlag.DRAWS
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    rng = np.random.default_rng(0)
    path = SamplingPath(is_full=True, draws=not gumbel, gumbel=gumbel)
    state = SamplingState.allocate(vocab_size, num_rows, num_rows, 1, device)
    for _ in range(100):
        numbers = rng.integers(0, 2**64, num_rows, dtype=np.uint64)
        records = records_of(num_rows, flags=int(flag), random=numbers)
        state.rows.copy_(torch.from_numpy(records.view(np.int32).reshape(num_rows, -1)))
        outcome = run(logits, state, block=64, path=path)
        counts += torch.bincount(outcome.out.token_ids.cpu(), minlength=vocab_size)
    expected = torch.softmax(logits[0].double().cpu(), dim=-1) * counts.sum()
    assert float(((counts - expected) ** 2 / expected).sum()) < 85.4


@pytest.mark.gpu
def test_a_captured_step_follows_the_records(device: torch.device) -> None:
    """Replays of one graph with other records and logits equal launches one by one."""
    num_rows, vocab_size = 16, 32000
    logits = randn(num_rows, vocab_size, torch.bfloat16, device)
    state = state_of(random_records(num_rows, vocab_size, 0), vocab_size, device)
    workspace = poisoned_workspace(state, 4096)
    out = SampledRows.allocate(num_rows, device)
    last_tokens = torch.zeros(num_rows, dtype=torch.int64, device=device)

    def step() -> None:
        sample(
            logits,
            state=state,
            workspace=workspace,
            path=FULL,
            last_tokens=last_tokens,
            out=out,
            launch_pdl=True,
        )

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in range(1, 6):
        logits.copy_(randn(num_rows, vocab_size + seed, torch.bfloat16, device)[:, :vocab_size])
        records = random_records(num_rows, vocab_size, seed)
        state.rows.copy_(torch.from_numpy(records.view(np.int32).reshape(num_rows, -1)))
        expected = run_reference(logits, state)
        graph.replay()
        assert out.token_ids.tolist() == expected.out.token_ids.tolist()
        assert torch.equal(state.token_counts, expected.token_counts)


@pytest.mark.gpu
@pytest.mark.slow
def test_rows_beyond_two_to_the_31_elements(device: torch.device) -> None:
    vocab_size = 1000
    storage = torch.zeros(2 * (2**30 + 8) + vocab_size, dtype=torch.bfloat16, device=device)
    logits = storage.as_strided((3, vocab_size), (2**30 + 8, 1))
    logits.copy_(randn(3, vocab_size, torch.bfloat16, device))
    state = state_of(random_records(3, vocab_size, 1), vocab_size, device)
    assert_same(run(logits, state), run_reference(logits.contiguous(), state))


@pytest.mark.parametrize(("num_tokens", "num_prompt_tokens"), [(0, 0), (1, 1), (3000, 1700)])
def test_counts_of_a_sequence(
    num_tokens: int, num_prompt_tokens: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(-3, 110, (num_tokens,), generator=generator, dtype=torch.int32)
    counts = torch.full((4, 100), POISON, dtype=torch.int32, device=device)
    expected = counts.clone()
    where = {"slot": 2, "num_prompt_tokens": num_prompt_tokens}
    count_tokens(token_ids.to(device), token_counts=counts, **where)
    count_tokens_reference(token_ids.to(device), token_counts=expected, **where)
    assert torch.equal(counts, expected)
    assert (counts[[0, 1, 3]] == POISON).all()


def test_an_empty_step_does_nothing(device: torch.device) -> None:
    state = state_of(records_of(1), 10, device)
    assert run(torch.empty(0, 10, device=device), state).last_tokens.tolist() == [-1]


def test_wrong_tensors_are_refused(device: torch.device) -> None:
    state = state_of(records_of(2), 10, device)
    with pytest.raises(ValueError, match=r"give \[num_rows, 10\]"):
        run(torch.zeros(2, 11, device=device), state)
    with pytest.raises(ValueError, match="num_rows up to 2"):
        run(torch.zeros(3, 10, device=device), state)
    with pytest.raises(ValueError, match="float64"):
        run(torch.zeros(2, 10, dtype=torch.float64, device=device), state)
    with pytest.raises(ValueError, match="column stride 2"):
        run(torch.zeros(10, 2, device=device).t()[:, :10], state)
    with pytest.raises(ValueError, match="vocab_size"):
        SamplingState.allocate((1 << 20) + 1, 1, 1, 1, device)
    counts = torch.zeros(2, 10, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"slot is 2"):
        count_tokens(counts[0], slot=2, num_prompt_tokens=0, token_counts=counts)
    assert SampledRows.allocate(2, device).top_ids.shape == (2, MAX_TOP_LOGPROBS)
