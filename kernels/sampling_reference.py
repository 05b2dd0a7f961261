"""Sampling of a step in plain torch, row by row: what the kernels are compared with.

Everything between logits and token is float64 except where a rounding is part of the definition:
scores and distances are float32, so that equal ones are ties.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels.sampling_rows import (
    PROMPT_BIT,
    ROW_DTYPE,
    STOP_BIT,
    RowFlag,
    SampledRows,
    SamplingState,
)

_LIMITS = torch.finfo(torch.float32)


def sample_reference(
    logits: Tensor, *, state: SamplingState, last_tokens: Tensor, out: SampledRows
) -> None:
    """Fill `out` and `last_tokens`, and count the tokens, for logits [num_rows, vocab_size]."""
    records = state.rows.cpu().numpy().view(ROW_DTYPE)[:, 0]
    for index in range(logits.shape[0]):
        record = records[index]
        slot, flags = int(record["slot"]), RowFlag(int(record["flags"]))
        out.token_ids[index] = 0
        if slot < 0:
            continue
        raw = logits[index].float()
        raw = torch.where(raw.isnan(), -torch.inf, raw)
        token = _choose(adjusted_scores(raw, record, index, state), record)
        out.token_ids[index] = token
        last_tokens[slot] = token
        if RowFlag.COUNTS in flags:
            state.token_counts[slot, token] += 1
        if RowFlag.LOGPROBS in flags:
            logprobs = torch.log_softmax(raw.double(), dim=-1).float()
            num_top = int(record["num_top"])
            best = raw.sort(descending=True, stable=True).indices[:num_top]
            out.logprobs[index] = logprobs[token]
            out.top_ids[index, :num_top] = best.int()
            out.top_logprobs[index, :num_top] = logprobs[best]


def adjusted_scores(raw: Tensor, record: np.void, index: int, state: SamplingState) -> Tensor:
    """float32 [vocab_size]: raw logits of row `index` after bias, penalties and allowed tokens."""
    flags, slot = RowFlag(int(record["flags"])), int(record["slot"])
    if RowFlag.ADJUSTS not in flags:
        return raw
    scores = raw.clone()
    tagged = state.edit_tokens[slot, : record["num_edits"]]
    tokens = (tagged & (STOP_BIT - 1)).long()
    if RowFlag.MASKS_STOPS in flags:
        scores[tokens[tagged & STOP_BIT != 0]] = _LIMITS.min
    scores[tokens] += state.edit_biases[slot, : len(tokens)]
    if RowFlag.COUNTS in flags:
        seen = state.token_counts[slot]
        counts = (seen & (PROMPT_BIT - 1)).float()
        repetition, frequency, presence = (
            torch.tensor(record[name], device=raw.device)
            for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")
        )
        values = torch.where(scores > 0, scores / repetition, scores * repetition)
        values -= frequency * counts + presence * (counts > 0)
        scores = torch.where(seen != 0, values.clamp(_LIMITS.min, _LIMITS.max), scores)
    if RowFlag.GRAMMAR in flags:
        tokens = torch.arange(len(scores), device=raw.device)
        words = state.allowed_tokens[index, tokens // 32]
        scores = torch.where((words >> (tokens % 32)) & 1 != 0, scores, -torch.inf)
    return scores


def _choose(scores: Tensor, record: np.void) -> int:
    flags = RowFlag(int(record["flags"]))
    if RowFlag.GUMBEL in flags:
        temperature = torch.tensor(record["temperature"], device=scores.device)
        noise = _gumbel_noise(int(record["random"]), len(scores))
        scores = scores / temperature + noise.to(scores.device)
    if RowFlag.DRAWS not in flags:
        return int(scores.max(dim=-1).indices)
    if scores.max() == -torch.inf:
        return len(scores) - 1
    cumulative = kept_weights(scores, record).cumsum(-1)
    target = int(record["random"]) * 2.0**-64 * cumulative[-1]
    return int(torch.searchsorted(cumulative, target, right=True).clamp_(max=len(scores) - 1))


def kept_weights(scores: Tensor, record: np.void) -> Tensor:
    """float64 [vocab_size]: shares of the tokens that may be drawn, 0 for the others."""
    temperature = torch.tensor(record["temperature"], device=scores.device)
    best = scores.max()
    distance = torch.where(scores == best, 0.0, best - scores) / temperature
    limit = torch.tensor(record["min_p_distance"], device=scores.device)
    weights = torch.where(distance <= limit, (-distance).double().exp(), 0.0)
    if RowFlag.FILTERS in RowFlag(int(record["flags"])):
        weights = _filtered(distance, limit, weights, record)
    return weights


def _filtered(distance: Tensor, limit: Tensor, weights: Tensor, record: np.void) -> Tensor:
    ordered, order = distance.sort()
    top_k, num_kept = int(record["top_k"]), int((distance <= limit).sum())
    if 0 < top_k < num_kept:
        weights = torch.where(distance <= ordered[top_k - 1], weights, 0.0)
    if record["top_p"] < 1.0:
        mass = weights[order].cumsum(-1)
        position = int((mass < float(record["top_p"]) * mass[-1]).sum())
        weights = torch.where(distance <= ordered[position], weights, 0.0)
    return weights


def _gumbel_noise(seed: int, vocab_size: int) -> Tensor:
    """float32 [vocab_size]: -log(-log(u)), u from Philox 4x32-10 with key `seed` at the token id.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
    """
    mask = np.uint64(0xFFFFFFFF)
    counter = [np.zeros(vocab_size, np.uint64) for _ in range(4)]
    counter[0] = np.arange(vocab_size, dtype=np.uint64)
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first = counter[0] * np.uint64(0xD2511F53)
        third = counter[2] * np.uint64(0xCD9E8D57)
        counter = [
            (third >> np.uint64(32)) ^ counter[1] ^ np.uint64(key[0]),
            third & mask,
            (first >> np.uint64(32)) ^ counter[3] ^ np.uint64(key[1]),
            first & mask,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    words = counter[0].astype(np.uint32).view(np.int32)
    words = np.where(words < 0, -words - 1, words)
    u = torch.from_numpy(words.astype(np.float32) * np.float32(4.6566127342e-10))
    return -torch.log(-torch.log(u.clamp(min=1e-10)))
