"""Every error the project raises on purpose, and the one table from error to wire status.

    BatonError
    ├── ConfigError            a setting is wrong; the process does not start
    ├── RequestError           the caller can do something about it
    │   ├── InvalidRequest         400  INVALID_ARGUMENT
    │   │   └── ContextLengthExceeded  prompt and output do not fit in the model's context
    │   ├── NotAuthorized          401  UNAUTHENTICATED
    │   ├── NotFound               404  NOT_FOUND
    │   │   └── ModelNotFound          no live worker serves a model of that name
    │   ├── MethodNotAllowed       405  UNIMPLEMENTED
    │   ├── PayloadTooLarge        413  INVALID_ARGUMENT
    │   ├── Overloaded             429  RESOURCE_EXHAUSTED   (carries retry_after_s)
    │   │   └── QuotaExceeded          the tenant has used what it may (carries rate_limits)
    │   ├── RequestCancelled       499  CANCELLED
    │   └── NotOffered             501  UNIMPLEMENTED   (known, and not done here)
    ├── ServiceError           the platform could not do it
    │   ├── InternalError          500  INTERNAL
    │   ├── Unavailable            503  UNAVAILABLE
    │   │   ├── NoWorker               no worker of the wanted role answers
    │   │   └── WorkerLost             the worker's session broke mid-request
    │   ├── RoleChangeRefused      409  FAILED_PRECONDITION
    │   ├── RoleChangeOvertaken    409  ABORTED
    │   └── DeadlineExceeded       504  DEADLINE_EXCEEDED
    └── TransferError          KV movement between two workers
        ├── IncompatiblePeer       fingerprint, version or layout differ
        ├── BadPeerCard            signature, expiry or shape of a peer card is wrong
        ├── PeerGone               the other process died or dropped us
        ├── TransferTimeout        our deadline passed; the blocks are in quarantine
        └── LeaseLost              the owner no longer vouches for what we read

Messages name the value, the limit and the fix; they never hold paths or tracebacks.
"""

from __future__ import annotations

from typing import NamedTuple


class BatonError(Exception):
    """Base of all deliberate errors."""


class ConfigError(BatonError):
    """A setting is unknown, malformed or contradicts another."""


class RequestError(BatonError):
    """The caller's request cannot be served as sent. `param` names the offending field."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequest(RequestError):
    """A field is missing, malformed or out of range."""


class ContextLengthExceeded(InvalidRequest):
    """Prompt and output together need more tokens than the model's context holds."""


class NotAuthorized(RequestError):
    """The credentials are missing or wrong."""


class NotFound(RequestError):
    """The named model or route does not exist."""


class ModelNotFound(NotFound):
    """No model of that name is served."""


class MethodNotAllowed(RequestError):
    """The route exists but not for this verb."""


class PayloadTooLarge(RequestError):
    """The body exceeds the configured limit."""


class Overloaded(RequestError):
    """No capacity now; the client may retry after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimit(NamedTuple):
    """Where a tenant stands with one of its rates."""

    name: str
    """requests or tokens, per minute."""
    limit: int
    remaining: int
    reset_s: float
    """Until all of it is there again, if nothing more is used."""


class QuotaExceeded(Overloaded):
    """The tenant has used what it may for now."""

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float = 1.0,
        rate_limits: tuple[RateLimit, ...] = (),
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.rate_limits = rate_limits


class RequestCancelled(RequestError):
    """The client went away or cancelled."""


class NotOffered(RequestError):
    """What was asked for is known and this platform, or this model, does not do it."""


class ServiceError(BatonError):
    """The platform failed; retrying later may help."""


class InternalError(ServiceError):
    """A defect of ours."""


class Unavailable(ServiceError):
    """A needed part of the platform does not answer."""


class NoWorker(Unavailable):
    """No live worker can take the request."""


class WorkerLost(Unavailable):
    """The worker serving this request went away."""


class DeadlineExceeded(ServiceError):
    """A stage did not finish within its deadline."""


class RoleChangeRefused(ServiceError):
    """A worker stays in its pool: it cannot serve in the other one, or is needed where it is."""


class RoleChangeOvertaken(ServiceError):
    """The worker began to leave for good while it changed its role."""


class TransferError(BatonError):
    """A KV read between two workers failed."""


class IncompatiblePeer(TransferError):
    """Two workers must not exchange KV; the message says which property differs."""


class BadPeerCard(TransferError):
    """A peer card failed verification."""


class PeerGone(TransferError):
    """The peer process is dead or unreachable."""


class TransferTimeout(TransferError):
    """A read passed its deadline and was given up on; its blocks are quarantined."""


class LeaseLost(TransferError):
    """The owner revoked or expired the lease before the read was validated."""


class WireStatus(NamedTuple):
    """How one error class looks on the wire: OpenAI `type`, HTTP status, gRPC code name."""

    http: int
    grpc: str
    openai_type: str


_WIRE: dict[type[BatonError], WireStatus] = {
    InvalidRequest: WireStatus(400, "INVALID_ARGUMENT", "invalid_request_error"),
    NotAuthorized: WireStatus(401, "UNAUTHENTICATED", "authentication_error"),
    NotFound: WireStatus(404, "NOT_FOUND", "not_found_error"),
    MethodNotAllowed: WireStatus(405, "UNIMPLEMENTED", "invalid_request_error"),
    PayloadTooLarge: WireStatus(413, "INVALID_ARGUMENT", "invalid_request_error"),
    Overloaded: WireStatus(429, "RESOURCE_EXHAUSTED", "rate_limit_error"),
    RequestCancelled: WireStatus(499, "CANCELLED", "request_cancelled"),
    NotOffered: WireStatus(501, "UNIMPLEMENTED", "not_implemented_error"),
    Unavailable: WireStatus(503, "UNAVAILABLE", "service_unavailable"),
    RoleChangeRefused: WireStatus(409, "FAILED_PRECONDITION", "conflict"),
    RoleChangeOvertaken: WireStatus(409, "ABORTED", "conflict"),
    DeadlineExceeded: WireStatus(504, "DEADLINE_EXCEEDED", "deadline_exceeded"),
}
_INTERNAL = WireStatus(500, "INTERNAL", "internal_error")


def wire_status(error: BaseException) -> WireStatus:
    """The status of `error`, found along its class hierarchy; anything unknown is internal."""
    for cls in type(error).__mro__:
        status = _WIRE.get(cls)
        if status is not None:
            return status
    return _INTERNAL


def public_message(error: BaseException) -> str:
    """What a client may read: our own messages as they are, anything else without details."""
    if isinstance(error, BatonError):
        return str(error)
    return "internal error; the server's log holds the details under this request id"
