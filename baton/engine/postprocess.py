"""From a sampled token to what the client learns: appended, or the end of the sequence.

Also what is refused before any token is sampled. Not known here: blocks, queues, time.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from baton.core.errors import BatonError, InvalidRequest, public_message
from baton.core.request import FinishReason, GenerateRequest, TokenDelta, Work
from baton.engine.batch import SampledToken
from baton.engine.sequence import Sequence


def accept_token(sequence: Sequence, sampled: SampledToken) -> TokenDelta:
    """Append the token, unless it stops the sequence, and say what happened.

    A stop id counts once min_tokens outputs exist; it ends the output, whose last token it is only
    when the request says so.
    """
    index = sequence.num_known_output_tokens
    delta = TokenDelta(sequence.request.request_id, index)
    if sampled.error:
        delta.finish_reason = FinishReason.ERROR
        delta.error = sampled.error
        return delta
    token_id, sampling = sampled.token_id, sequence.request.sampling
    is_stop = token_id in sequence.stop_ids and index >= sampling.min_tokens
    if is_stop:
        delta.finish_reason = FinishReason.STOP
        delta.stop_token_id = token_id
        if not sampling.include_stop_token:
            return delta
    sequence.token_ids.append(token_id)
    delta.token_ids.append(token_id)
    if sampled.logprobs is not None:
        delta.logprobs.append(sampled.logprobs)
    if len(sequence.token_ids) >= sequence.max_num_tokens and not is_stop:
        delta.finish_reason = FinishReason.LENGTH
    return delta


def end_delta(sequence: Sequence, reason: FinishReason) -> TokenDelta:
    """The end of a sequence without another token."""
    index = sequence.num_known_output_tokens
    return TokenDelta(sequence.request_id, index, finish_reason=reason)


def refused_delta(sequence: Sequence, error: BatonError) -> TokenDelta:
    """The end of a sequence that turned out to be impossible, on any worker."""
    delta = end_delta(sequence, FinishReason.ERROR)
    delta.error = public_message(error)
    return delta


def error_delta(sequence: Sequence, error: Exception) -> TokenDelta:
    """The end of a sequence whose step failed; another worker may do better."""
    delta = end_delta(sequence, FinishReason.ERROR)
    detail = "" if isinstance(error, BatonError) else f"{type(error).__name__}: "
    delta.error = f"the engine's step failed: {detail}{public_message(error)}"
    delta.is_retryable = True
    return delta


def check_arrived(
    sequence: Sequence, arrived: TokenDelta, *, block_size: int, vocab_size: int | None
) -> int:
    """How many tokens of a reserved sequence have KV, once `arrived` says what its owner sampled.

    DECODE: those the request came with; one token follows. TAKEOVER: all but the last. Raises
    InvalidRequest, before anything has changed, for what cannot belong to the sequence.
    """
    request_id, token_ids = sequence.request_id, arrived.token_ids
    _check_token_ids(token_ids, vocab_size, what=f"request {request_id}: a token that arrived")
    if sequence.work is Work.DECODE:
        has_ended = sequence.is_abandoned or arrived.finish_reason is not None
        if not has_ended and len(token_ids) != 1:
            raise InvalidRequest(f"request {request_id}: {len(token_ids)} first tokens, not 1")
        return sequence.num_tokens
    index = sequence.num_known_output_tokens
    if arrived.first_index != index:
        raise InvalidRequest(
            f"request {request_id}: output {arrived.first_index} arrived where {index} is next"
        )
    num_kv_tokens = sequence.num_tokens + len(token_ids) - 1
    num_held = len(sequence.block_table) * block_size
    if num_kv_tokens > num_held or num_kv_tokens >= sequence.max_num_tokens:
        raise InvalidRequest(
            f"request {request_id}: {len(token_ids)} more tokens arrived, its blocks hold "
            f"{num_held} tokens in all and {sequence.max_num_tokens} are its limit"
        )
    return num_kv_tokens


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
    for token_ids in (request.prompt_token_ids, request.output_token_ids):
        _check_token_ids(token_ids, vocab_size, what="token id", param="prompt")
    sampling = request.sampling
    _check_token_ids(
        sampling.allowed_token_ids, vocab_size, what="token id", param="allowed_token_ids"
    )
    for word in sampling.bad_words_ids:
        _check_token_ids(word, vocab_size, what="token id", param="bad_words")


def _check_token_ids(
    token_ids: SequenceOf[int], vocab_size: int | None, *, what: str, param: str | None = None
) -> None:
    if vocab_size is None or not token_ids:
        return
    smallest, largest = min(token_ids), max(token_ids)
    if not 0 <= smallest <= largest < vocab_size:
        worst = smallest if smallest < 0 else largest
        raise InvalidRequest(
            f"{what} {worst} is outside the vocabulary of 0 to {vocab_size - 1}", param=param
        )
