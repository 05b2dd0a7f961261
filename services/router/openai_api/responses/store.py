"""Responses that can be fetched and continued, bounded in number, bytes and time.

Pure: time is passed in. Does not know what a response looks like.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from services.router.edge.responses_config import ResponsesConfig

ENTRY_BYTES = 512
"""What an entry takes beside its contents."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One response."""

    body: bytes
    """As JSON."""
    messages: bytes | None
    """The conversation with its answer, as a JSON list of chat messages; None: it cannot go on."""

    @property
    def num_bytes(self) -> int:
        return ENTRY_BYTES + len(self.body) + len(self.messages or b"")


@dataclass(frozen=True, slots=True)
class _Entry:
    tenant: str
    stored: Stored
    put_at_s: float


class ResponseStore:
    """Of one router copy. A tenant sees its own; one that has more than half of the room loses its
    own oldest before anybody else's."""

    def __init__(self, config: ResponsesConfig) -> None:
        self._config = config
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        """By id, the oldest first."""
        self._of_tenant: dict[str, OrderedDict[str, None]] = {}
        self._tenant_bytes: dict[str, int] = {}
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, tenant: str, response_id: str, stored: Stored, now_s: float) -> None:
        """In place of what is there under this id. What is larger than the store is not kept."""
        self._expire(now_s)
        self._remove(response_id)
        if stored.num_bytes > self._config.max_stored_bytes:
            return
        self._entries[response_id] = _Entry(tenant, stored, now_s)
        self._of_tenant.setdefault(tenant, OrderedDict())[response_id] = None
        self._tenant_bytes[tenant] = self._tenant_bytes.get(tenant, 0) + stored.num_bytes
        self.num_bytes += stored.num_bytes
        while self._is_over():
            self._remove(self._next_to_go(tenant))

    def get(self, tenant: str, response_id: str, now_s: float) -> Stored | None:
        self._expire(now_s)
        entry = self._entries.get(response_id)
        return entry.stored if entry is not None and entry.tenant == tenant else None

    def delete(self, tenant: str, response_id: str, now_s: float) -> bool:
        """Whether it was there."""
        if self.get(tenant, response_id, now_s) is None:
            return False
        self._remove(response_id)
        return True

    def check(self) -> None:
        """The accounts agree with what is there."""
        assert self.num_bytes == sum(e.stored.num_bytes for e in self._entries.values())
        assert self.num_bytes == sum(self._tenant_bytes.values())
        assert set(self._entries) == set(self._ids())
        assert not self._is_over()
        assert set(self._of_tenant) == set(self._tenant_bytes)

    def _ids(self) -> Iterator[str]:
        for ids in self._of_tenant.values():
            yield from ids

    def _is_over(self) -> bool:
        config = self._config
        return len(self._entries) > config.max_stored or self.num_bytes > config.max_stored_bytes

    def _next_to_go(self, tenant: str) -> str:
        own, config = self._of_tenant[tenant], self._config
        is_large = (
            2 * self._tenant_bytes[tenant] > config.max_stored_bytes
            or 2 * len(own) > config.max_stored
        )
        # Never the one just put.
        if is_large and len(own) > 1:
            return next(iter(own))
        return next(iter(self._entries))

    def _expire(self, now_s: float) -> None:
        while self._entries:
            response_id, entry = next(iter(self._entries.items()))
            if now_s - entry.put_at_s < self._config.keep_s:
                return
            self._remove(response_id)

    def _remove(self, response_id: str) -> None:
        entry = self._entries.pop(response_id, None)
        if entry is None:
            return
        ids = self._of_tenant[entry.tenant]
        del ids[response_id]
        self.num_bytes -= entry.stored.num_bytes
        self._tenant_bytes[entry.tenant] -= entry.stored.num_bytes
        if not ids:
            del self._of_tenant[entry.tenant], self._tenant_bytes[entry.tenant]
