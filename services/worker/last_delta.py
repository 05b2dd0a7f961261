"""The deltas that end a request on this worker."""

from __future__ import annotations

from baton.core.errors import BatonError, InvalidRequest, Overloaded
from baton.core.request import FinishReason, RequestId, TokenDelta


def is_last(delta: TokenDelta) -> bool:
    """True for the last delta of a request on this worker: finished, or prefilled and handed on."""
    return delta.finish_reason is not None or delta.timeline is not None


def error_delta(request_id: RequestId, message: str, *, is_retryable: bool) -> TokenDelta:
    """The end of a request that failed here."""
    return TokenDelta(
        request_id,
        finish_reason=FinishReason.ERROR,
        error=message,
        is_retryable=is_retryable,
    )


def refusal(request_id: RequestId, error: BatonError) -> TokenDelta:
    """The answer to a submit this worker does not take. Only a wrong request is hopeless."""
    delta = error_delta(request_id, str(error), is_retryable=not isinstance(error, InvalidRequest))
    delta.is_overload = isinstance(error, Overloaded)
    return delta


def handed_back(request_id: RequestId, message: str) -> TokenDelta:
    """The end of a request that another worker is to go on with, for no fault of anybody's."""
    delta = error_delta(request_id, message, is_retryable=True)
    delta.is_handed_back = True
    return delta


def turn_into_failure(delta: TokenDelta, message: str) -> None:
    """Make the end that the engine reports a retryable error."""
    delta.finish_reason, delta.error, delta.is_retryable = FinishReason.ERROR, message, True
