"""Deltas off the wire, on the hot path: one token of one sequence is the common case.

Most deltas are a position and a token; converting only what is set costs a third of the general
conversion in `baton.rpc.convert`, which remains in charge of everything else.
"""

from __future__ import annotations

from baton.core.request import RequestId, TokenDelta
from baton.rpc import convert
from baton.rpc.v1 import worker_pb2 as pb


def delta_from_wire(message: pb.Delta) -> TokenDelta:
    """Equal to `convert.delta_from_wire`, faster for plain tokens."""
    is_plain = not (message.finish_reason or message.logprobs or message.prompt_logprobs)
    if not is_plain or message.HasField("timeline"):
        return convert.delta_from_wire(message)
    if not message.first_index and message.prompt_logprobs:
        return convert.delta_from_wire(message)
    return TokenDelta(
        RequestId(message.request_id),
        message.first_index,
        message.token_ids[:],
        num_cached_tokens=message.num_cached_tokens,
    )


def is_last(delta: TokenDelta) -> bool:
    """The worker has finished with the request, or handed it on after the prefill."""
    return delta.finish_reason is not None or delta.timeline is not None
