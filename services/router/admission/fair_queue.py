"""Who goes next: deficit round robin over tenants, in tokens of work. A plain state machine.

    tenant a   deficit ▓▓▓▓▓      [head ▒▒▒▒ | ... ]     served: the deficit covers its head
    tenant b   deficit ▓▓         [head ▒▒▒▒▒▒ | ... ]   rotates, +quantum x weight a round
    tenant c   deficit -▓▓▓       [head ▒ | ... ]        owes what its last requests used too much

Within a tenant the smaller priority number goes first, within a priority the earlier due time, then
the earlier arrival. A request is charged what it is expected to cost when it is taken, and the
difference to what it has used when it is settled: prefill work and decode residency alike.

What is used while nobody waits is free. A tenant whose queue runs empty loses its credit and
keeps its debt.

The queue is bounded in requests and in tokens of work. A full one pushes out the last request of
the tenant that has most waiting for its weight, be that the newcomer or another.

Source: Shreedhar and Varghese, "Efficient Fair Queuing Using Deficit Round Robin" (1996); longest
queue drop: Suter et al., "Design considerations for supporting TCP with per-flow queueing" (1998).

Does not know: time, workers, why a head cannot be taken now.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

MAX_DEBTORS = 4096
"""Tenants without waiting requests whose debt is remembered."""
MAX_DEBT_QUANTA = 64.0
"""No tenant owes more than this many rounds: a mistaken estimate must not silence it for long."""


@dataclass(slots=True, eq=False)
class Entry:
    """One waiting request."""

    tenant: str
    cost_tokens: float
    """Work it is expected to be; above 0."""
    priority: int = 0
    """A smaller number goes first."""
    due_at_s: float = math.inf
    weight: float = 1.0
    """Of its tenant; the last one heard counts."""
    is_queued: bool = False
    """Kept by the queue."""
    _number: int = 0


E = TypeVar("E", bound=Entry)


class Bounds(NamedTuple):
    """0 is no bound, for one tenant."""

    max_requests: int
    max_tokens: float
    max_tenant_requests: int = 0
    max_tenant_tokens: float = 0.0


class _Key(NamedTuple):
    priority: int
    due_at_s: float
    number: int


@dataclass(slots=True, eq=False)
class _Flow(Generic[E]):
    """One tenant with waiting requests. `keys` and `entries` are sorted alike, the next first."""

    tenant: str
    weight: float
    deficit: float = 0.0
    keys: list[_Key] = field(default_factory=list)
    entries: list[E] = field(default_factory=list)
    queued_tokens: float = 0.0

    @property
    def pressure(self) -> float:
        """Work waiting, for the weight."""
        return self.queued_tokens / self.weight


class FairQueue(Generic[E]):
    """push → (take | remove); settle after a taken request has ended."""

    def __init__(self, bounds: Bounds, *, quantum_tokens: float) -> None:
        self._bounds = bounds
        self._quantum = quantum_tokens
        self._flows: dict[str, _Flow[E]] = {}
        self._ring: deque[_Flow[E]] = deque()
        """The flows; the one whose turn it is first."""
        self._debts: OrderedDict[str, float] = OrderedDict()
        """Of tenants without waiting requests, below 0."""
        self._num_entries = 0
        self._num_pushed = 0
        self.queued_tokens = 0.0

    def __len__(self) -> int:
        return self._num_entries

    def num_waiting(self, tenant: str) -> int:
        flow = self._flows.get(tenant)
        return 0 if flow is None else len(flow.entries)

    def tenants(self) -> Iterator[tuple[str, int]]:
        """(tenant, number of its waiting requests)."""
        return ((flow.tenant, len(flow.entries)) for flow in self._ring)

    def __iter__(self) -> Iterator[E]:
        for flow in self._ring:
            yield from flow.entries

    def push(self, entry: E) -> list[E]:
        """Queue `entry`. Returns those that had no room, the entry itself among them or not."""
        assert not entry.is_queued and entry.cost_tokens > 0
        self._num_pushed += 1
        entry._number = self._num_pushed
        self._insert(entry)
        pushed_out: list[E] = []
        while entry.is_queued and (flow := self._overfull(self._flows[entry.tenant])) is not None:
            pushed_out.append(flow.entries[-1])
            self.remove(flow.entries[-1])
        return pushed_out

    def remove(self, entry: E) -> None:
        """Take a waiting entry out uncharged, wherever it is."""
        assert entry.is_queued, "not in the queue"
        flow = self._flows[entry.tenant]
        index = bisect_left(flow.keys, _key(entry))
        assert flow.entries[index] is entry
        del flow.keys[index], flow.entries[index]
        entry.is_queued = False
        flow.queued_tokens -= entry.cost_tokens
        self.queued_tokens -= entry.cost_tokens
        self._num_entries -= 1
        if not flow.entries:
            self._close(flow)

    def heads(self) -> Iterator[E]:
        """The request whose turn it is, then, for when it cannot go now, those of the other tenants
        in their order. Nothing may be pushed, taken or removed while this is read."""
        if self._ring:
            self._advance()
        return (flow.entries[0] for flow in self._ring)

    def take(self, entry: E) -> None:
        """Take out the head of a tenant and charge the tenant its cost.

        A head taken out of turn may leave its tenant in debt.
        """
        flow = self._flows[entry.tenant]
        assert flow.entries[0] is entry, "only the head of a tenant can be taken"
        self._charge(flow, entry.cost_tokens)
        self.remove(entry)

    def settle(self, tenant: str, difference_tokens: float) -> None:
        """A taken request of `tenant` has used this much more than it was charged (less: < 0)."""
        flow = self._flows.get(tenant)
        if flow is not None:
            self._charge(flow, difference_tokens)
        elif self._ring and difference_tokens > 0:
            self._owe(tenant, self._debts.pop(tenant, 0.0) - difference_tokens)

    def reprice(self, entry: E, cost_tokens: float) -> None:
        """Its expected cost is known better now."""
        assert cost_tokens > 0
        if entry.is_queued:
            difference = cost_tokens - entry.cost_tokens
            self._flows[entry.tenant].queued_tokens += difference
            self.queued_tokens += difference
        entry.cost_tokens = cost_tokens

    def tokens_ahead(self, entry: E) -> float:
        """Work that is served before `entry` gets its turn, if nobody else comes. It waits already,
        or might be pushed now.

        While its tenant gets what is before it, every other tenant gets as much for its weight, as
        far as it has so much waiting.
        """
        flow = self._flows.get(entry.tenant)
        own = min(-self._debts.get(entry.tenant, 0.0), self._max_debt(entry.weight))
        if flow is not None:
            key = _key(entry) if entry.is_queued else _key(entry)._replace(number=sys.maxsize)
            index = bisect_left(flow.keys, key)
            own = sum(e.cost_tokens for e in flow.entries[:index]) - min(0.0, flow.deficit)
        share = (own + entry.cost_tokens) / entry.weight
        others = sum(
            min(other.queued_tokens, share * other.weight)
            for other in self._ring
            if other is not flow
        )
        return own + others

    def outlook(self) -> Iterator[tuple[E, float]]:
        """Every waiting entry with its `tokens_ahead`, tenant by tenant. As for `heads`."""
        for flow in self._ring:
            own = -min(0.0, flow.deficit)
            others = [
                (f.queued_tokens, f.weight / flow.weight) for f in self._ring if f is not flow
            ]
            for entry in flow.entries:
                share = own + entry.cost_tokens
                yield entry, own + sum(min(queued, share * weight) for queued, weight in others)
                own += entry.cost_tokens

    def check_integrity(self) -> None:
        """Raises AssertionError on a state that must not exist."""
        assert len(self._flows) == len(self._ring) and not self._debts.keys() & self._flows.keys()
        assert len(self._debts) <= MAX_DEBTORS and all(debt < 0 for debt in self._debts.values())
        num_entries, tokens = 0, 0.0
        for flow in self._ring:
            assert self._flows[flow.tenant] is flow and flow.entries and flow.weight > 0
            assert flow.keys == sorted(flow.keys) == [_key(e) for e in flow.entries]
            assert all(e.is_queued and e.tenant == flow.tenant for e in flow.entries)
            own = sum(e.cost_tokens for e in flow.entries)
            assert math.isclose(own, flow.queued_tokens, rel_tol=1e-6, abs_tol=1e-3)
            assert flow.deficit >= -self._max_debt(flow.weight)
            num_entries += len(flow.entries)
            tokens += own
        assert num_entries == self._num_entries
        assert math.isclose(tokens, self.queued_tokens, rel_tol=1e-6, abs_tol=1e-3)
        assert num_entries <= self._bounds.max_requests

    def _insert(self, entry: E) -> None:
        flow = self._flows.get(entry.tenant)
        if flow is None:
            debt = self._debts.pop(entry.tenant, 0.0)
            flow = self._flows[entry.tenant] = _Flow(entry.tenant, entry.weight, debt)
            self._ring.append(flow)
        flow.weight = entry.weight
        self._charge(flow, 0.0)
        key = _key(entry)
        flow.entries.insert(bisect_left(flow.keys, key), entry)
        insort(flow.keys, key)
        entry.is_queued = True
        flow.queued_tokens += entry.cost_tokens
        self.queued_tokens += entry.cost_tokens
        self._num_entries += 1

    def _overfull(self, flow: _Flow[E]) -> _Flow[E] | None:
        """The tenant that must give way, when the queue is too long with the last entry of `flow`;
        among equals `flow` itself."""
        bounds = self._bounds
        if self._num_entries > bounds.max_requests or self.queued_tokens > bounds.max_tokens:
            return max(self._ring, key=lambda f: (f.pressure, f is flow))
        is_too_long = 0 < bounds.max_tenant_requests < len(flow.entries)
        is_too_much = 0 < bounds.max_tenant_tokens < flow.queued_tokens
        return flow if is_too_long or is_too_much else None

    def _advance(self) -> None:
        """Turn the ring until the first flow can pay for its head."""
        for _ in range(len(self._ring)):
            if self._rounds_needed(self._ring[0]) <= 0:
                return
            self._ring.rotate(-1)
        # Nobody can: all get as many rounds as the first one to afford its head needs.
        num_rounds = min(self._rounds_needed(flow) for flow in self._ring)
        for flow in self._ring:
            flow.deficit += num_rounds * self._quantum * flow.weight
        while self._rounds_needed(self._ring[0]) > 0:
            self._ring.rotate(-1)

    def _rounds_needed(self, flow: _Flow[E]) -> int:
        missing = flow.entries[0].cost_tokens - flow.deficit
        return math.ceil(missing / (self._quantum * flow.weight) - 1e-9)

    def _charge(self, flow: _Flow[E], tokens: float) -> None:
        flow.deficit = max(flow.deficit - tokens, -self._max_debt(flow.weight))

    def _max_debt(self, weight: float) -> float:
        return MAX_DEBT_QUANTA * self._quantum * weight

    def _close(self, flow: _Flow[E]) -> None:
        del self._flows[flow.tenant]
        self._ring.remove(flow)
        if not self._ring:
            # Nobody waits: everybody starts anew.
            self._debts.clear()
            self.queued_tokens = 0.0
        elif flow.deficit < 0:
            self._owe(flow.tenant, flow.deficit)

    def _owe(self, tenant: str, deficit: float) -> None:
        # Bounded when the tenant comes back, by the weight that it has then.
        self._debts[tenant] = deficit
        if len(self._debts) > MAX_DEBTORS:
            self._debts.popitem(last=False)


def _key(entry: Entry) -> _Key:
    return _Key(entry.priority, entry.due_at_s, entry._number)
