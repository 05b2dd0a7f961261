"""From a sampled token to what the client learns: appended, or the end of the sequence.

Not known here: blocks, queues, time.
"""

from __future__ import annotations

from baton.core.errors import BatonError, InvalidRequest, public_message
from baton.core.request import FinishReason, GenerateRequest, TokenDelta
from baton.engine.batch import SampledToken
from baton.engine.sequence import Sequence


def accept_token(sequence: Sequence, sampled: SampledToken) -> TokenDelta:
    """Append the token, unless it stops the sequence, and say what happened.

    A stop id counts once min_tokens outputs exist; it ends the output without being part of it.
    """
    index = sequence.num_known_output_tokens
    delta = TokenDelta(sequence.request.request_id, index)
    token_id = sampled.token_id
    if token_id in sequence.stop_ids and index >= sequence.request.sampling.min_tokens:
        delta.finish_reason = FinishReason.STOP
        delta.stop_token_id = token_id
        return delta
    sequence.token_ids.append(token_id)
    delta.token_ids.append(token_id)
    if sampled.logprobs is not None:
        delta.logprobs.append(sampled.logprobs)
    if len(sequence.token_ids) >= sequence.max_num_tokens:
        delta.finish_reason = FinishReason.LENGTH
    return delta


def end_delta(sequence: Sequence, reason: FinishReason) -> TokenDelta:
    """The end of a sequence without another token."""
    index = sequence.num_known_output_tokens
    return TokenDelta(sequence.request_id, index, finish_reason=reason)


def error_delta(sequence: Sequence, error: Exception) -> TokenDelta:
    """The end of a sequence whose step failed; another worker may do better."""
    delta = end_delta(sequence, FinishReason.ERROR)
    detail = "" if isinstance(error, BatonError) else f"{type(error).__name__}: "
    delta.error = f"the engine's step failed: {detail}{public_message(error)}"
    delta.is_retryable = True
    return delta


def check_request(
    request: GenerateRequest, *, max_num_tokens: int, block_size: int, vocab_size: int | None
) -> None:
    """Raises InvalidRequest for what this engine could never compute, with the numbers."""
    num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
    if num_tokens + 1 > max_num_tokens:
        raise InvalidRequest(
            f"the prompt has {num_tokens} tokens and this worker holds {max_num_tokens} of prompt "
            f"and output together; shorten it to at most {max_num_tokens - 1}",
            param="prompt",
        )
    if len(request.output_token_ids) >= request.sampling.max_tokens:
        raise InvalidRequest(
            f"{len(request.output_token_ids)} output tokens exist already and max_tokens is "
            f"{request.sampling.max_tokens}; nothing is left to generate",
            param="max_tokens",
        )
    num_full_blocks = len(request.prompt_token_ids) // block_size
    if len(request.block_hashes) > num_full_blocks:
        raise InvalidRequest(
            f"{len(request.block_hashes)} block hashes for a prompt of {num_full_blocks} full "
            f"blocks of {block_size} tokens; hash with this worker's block_size"
        )
    if vocab_size is not None:
        _check_vocabulary(request, vocab_size)


def _check_vocabulary(request: GenerateRequest, vocab_size: int) -> None:
    for token_ids in (request.prompt_token_ids, request.output_token_ids):
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            worst = min(token_ids) if min(token_ids) < 0 else max(token_ids)
            raise InvalidRequest(
                f"token id {worst} is outside the vocabulary of 0 to {vocab_size - 1}",
                param="prompt",
            )
