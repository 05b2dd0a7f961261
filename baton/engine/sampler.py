"""From logits to tokens, for a whole batch at once.

    raw logits ─┬─► log-softmax ─► logprobs
                └─► mask stops, bias, penalties, token masks ─► greedy: argmax
                                  └► temperature ─► min-p ─► top-k ─► top-p ─► draw

Sequences that take the plain argmax share one operator. Randomness is a function of (seed, output
position), so a replay on another worker draws the same tokens; a request without a seed draws
from its id. Not known here: the model, stop conditions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from baton.core.request import SamplingParams, TokenLogprobs
from baton.engine.batch import SampledToken
from baton.engine.logit_adjuster import LogitAdjuster, is_adjusted
from baton.engine.sequence import Sequence
from baton.engine.token_masks import TokenMask

TOP_P_CANDIDATES = (64, 1024)
"""Most likely tokens to look at before sorting the whole vocabulary: sorting 49,152 logits costs
40 times as much as finding the best 64."""
_WORD = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on `seed` and the output position alone.

    Source: the SplitMix64 generator (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number
    Generators", 2014), entered at `position`.
    """
    return (_mix(_mix(seed & _WORD) + (position + 1) * _GOLDEN_GAMMA) >> 11) * 2.0**-53


def _mix(word: int) -> int:
    word &= _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def request_seed(sequence: Sequence) -> int:
    """The request's own seed, or one that every worker derives alike from the request's id."""
    seed = sequence.request.sampling.seed
    if seed is not None:
        return seed
    digest = hashlib.blake2b(sequence.request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class Sampler:
    """Called once a step with the sequences that sample in it."""

    def __init__(self, vocab_size: int) -> None:
        self._adjuster = LogitAdjuster(vocab_size)

    def sample(
        self,
        sequences: SequenceOf[Sequence],
        logits: Tensor,
        masks: Mapping[Sequence, TokenMask] | None = None,
    ) -> list[SampledToken]:
        """One token per row of logits [len(sequences), vocab_size], which are left unchanged.

        `masks` of those sequences that may not take every token.
        """
        masks = masks or {}
        token_ids = self._choose(sequences, logits, masks)
        wanted = [i for i, s in enumerate(sequences) if s.request.sampling.logprobs is not None]
        if not wanted and not masks:
            return [SampledToken(token_id, None) for token_id in token_ids]
        found = _logprobs(sequences, logits, token_ids, wanted) if wanted else []
        logprobs = dict(zip(wanted, found, strict=True))
        return [
            SampledToken(token_id, logprobs.get(i), error=_error(masks.get(sequences[i])))
            for i, token_id in enumerate(token_ids)
        ]

    def _choose(
        self,
        sequences: SequenceOf[Sequence],
        logits: Tensor,
        masks: Mapping[Sequence, TokenMask],
    ) -> list[int]:
        plain: list[int] = []
        special: list[int] = []
        for i, sequence in enumerate(sequences):
            is_plain = (
                sequence.request.sampling.is_greedy
                and not is_adjusted(sequence)
                and sequence not in masks
            )
            (plain if is_plain else special).append(i)
        if not special:
            return _argmax(logits)
        token_ids = [0] * len(sequences)
        if plain:
            _scatter(token_ids, plain, _argmax(logits[plain]))
        chosen = [sequences[i] for i in special]
        adjusted = self._adjuster.adjust_(chosen, logits[special].float())
        _mask_(chosen, adjusted, masks)
        greedy = [j for j, s in enumerate(chosen) if s.request.sampling.is_greedy]
        if greedy:
            _scatter(token_ids, [special[j] for j in greedy], _argmax(adjusted[greedy]))
        random = [j for j, s in enumerate(chosen) if not s.request.sampling.is_greedy]
        if random:
            drawn = _draw([chosen[j] for j in random], adjusted[random])
            _scatter(token_ids, [special[j] for j in random], drawn)
        return token_ids


def _error(mask: TokenMask | None) -> str:
    return "" if mask is None else mask.error


def _mask_(
    sequences: SequenceOf[Sequence], logits: Tensor, masks: Mapping[Sequence, TokenMask]
) -> None:
    """Make what is not allowed impossible, in logits [len(sequences), vocab_size] in place."""
    if masks.keys().isdisjoint(sequences):
        return
    banned = np.zeros((len(sequences), -(-logits.shape[1] // 32)), dtype=np.int32)
    for row, sequence in enumerate(sequences):
        mask = masks.get(sequence)
        if mask is not None:
            banned[row] = ~mask.words
    bits = np.unpackbits(banned.view(np.uint8), axis=1, count=logits.shape[1], bitorder="little")
    logits.masked_fill_(torch.from_numpy(bits).view(torch.bool), float("-inf"))


def _scatter(token_ids: list[int], rows: list[int], values: list[int]) -> None:
    for row, value in zip(rows, values, strict=True):
        token_ids[row] = value


def _argmax(logits: Tensor) -> list[int]:
    """The first largest entry of each row. `max` is five times faster than `argmax` on CPUs."""
    token_ids: list[int] = logits.max(dim=-1).indices.tolist()
    return token_ids


def _logprobs(
    sequences: SequenceOf[Sequence], logits: Tensor, token_ids: list[int], wanted: list[int]
) -> list[TokenLogprobs]:
    """Log-softmax of the model's own logits, before any adjustment."""
    logprobs = torch.log_softmax(logits[wanted].float(), dim=-1)
    counts = [sequences[i].request.sampling.logprobs or 0 for i in wanted]
    chosen = [token_ids[i] for i in wanted]
    values = logprobs.gather(-1, torch.tensor(chosen)[:, None])[:, 0].tolist()
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(wanted)
    if max(counts):
        best = logprobs.topk(min(max(counts), logprobs.shape[-1]), dim=-1)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        tops = [
            tuple(zip(ids[:n], tops_of_row[:n], strict=True))
            for n, (ids, tops_of_row) in zip(counts, pairs, strict=True)
        ]
    return [
        TokenLogprobs(token_id, value, top)
        for token_id, value, top in zip(chosen, values, tops, strict=True)
    ]


def _draw(sequences: SequenceOf[Sequence], logits: Tensor) -> list[int]:
    """Inverse of the cumulative distribution in vocabulary order; changes `logits`."""
    params = [s.request.sampling for s in sequences]
    # Differences to the largest logit cannot overflow upwards, whatever the temperature.
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    logits.div_(torch.tensor([p.temperature for p in params])[:, None])
    _keep_min_p(params, logits)
    _keep_top_k(params, logits)
    _keep_top_p(params, logits)
    cumulative = torch.softmax(logits, dim=-1).cumsum(dim=-1, dtype=torch.float64)
    numbers = [uniform(request_seed(s), s.num_output_tokens) for s in sequences]
    total = cumulative[:, -1:]
    targets = torch.tensor(numbers, dtype=torch.float64)[:, None] * total
    # Rounded up to the total, a target would lie behind the last possible token.
    targets = torch.minimum(targets, total.nextafter(torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    token_ids: list[int] = drawn.clamp_(max=logits.shape[-1] - 1).tolist()
    return token_ids


def _keep_min_p(params: list[SamplingParams], logits: Tensor) -> None:
    """Remove tokens less likely than min_p times the most likely one."""
    if not any(p.min_p for p in params):
        return
    floor = torch.tensor([p.min_p for p in params]).log_()[:, None]
    floor += logits.amax(dim=-1, keepdim=True)
    logits.masked_fill_(logits < floor, float("-inf"))


def _keep_top_k(params: list[SamplingParams], logits: Tensor) -> None:
    """Remove tokens below the k-th largest logit; ties with it stay."""
    vocab_size = logits.shape[-1]
    rows = [i for i, p in enumerate(params) if 0 < p.top_k < vocab_size]
    if not rows:
        return
    counts = torch.tensor([params[i].top_k for i in rows])
    part = logits[rows]
    largest = part.topk(int(counts.max()), dim=-1).values
    floor = largest.gather(-1, counts[:, None] - 1)
    logits[rows] = part.masked_fill_(part < floor, float("-inf"))


def _keep_top_p(params: list[SamplingParams], logits: Tensor) -> None:
    """Keep the fewest most likely tokens whose probabilities reach top_p, and ties of the last."""
    rows = [i for i, p in enumerate(params) if p.top_p < 1.0]
    for count in (*TOP_P_CANDIDATES, logits.shape[-1]):
        if not rows:
            return
        part = logits[rows]
        largest = part.topk(min(count, part.shape[-1]), dim=-1).values
        total = part.logsumexp(dim=-1, keepdim=True)
        mass = (largest - total).exp_().cumsum(dim=-1, dtype=torch.float64)
        wanted = torch.tensor([params[i].top_p for i in rows], dtype=torch.float64)[:, None]
        # Rounding may leave the mass of the whole vocabulary a little below top_p.
        position = (mass < wanted).sum(dim=-1, keepdim=True).clamp_(max=part.shape[-1] - 1)
        is_found = (position < largest.shape[-1])[:, 0].tolist()
        found = [j for j, found in enumerate(is_found) if found]
        if found:
            floor = largest[found].gather(-1, position[found])
            kept = part[found]
            logits[[rows[j] for j in found]] = kept.masked_fill_(kept < floor, float("-inf"))
        rows = [row for row, found in zip(rows, is_found, strict=True) if not found]
