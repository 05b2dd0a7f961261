"""What is taken of a quota before a long prompt is made into tokens, so that a tenant without any
left does not cost that work.

Does not know: HTTP, how quotas are counted.
"""

from __future__ import annotations

from services.router.shared.state import QuotaGrant, SharedState


class QuotaHold:
    """A request and a slot of a tenant's quota, held while its prompt is made into tokens.

    Ends with `claim`, by the request, or with `release`; both may be called at any time after.
    """

    def __init__(self, shared: SharedState, grant: QuotaGrant) -> None:
        self._shared = shared
        self._grant: QuotaGrant | None = grant

    def claim(self) -> QuotaGrant | None:
        """The grant, once."""
        grant, self._grant = self._grant, None
        return grant

    def release(self) -> None:
        """The request will not be, or has claimed it."""
        undo(self._shared, self.claim())


def undo(shared: SharedState, grant: QuotaGrant | None) -> None:
    """As if it had never been granted."""
    if grant is not None:
        shared.return_quota(grant, num_unused_tokens=grant.num_tokens, num_unused_requests=1)
