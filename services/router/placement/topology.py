"""What it costs to move KV from one worker to another: two matrices over the workers' rows. Pure.

Best knowledge first: what the reader measured on that link, what the other side measured in the
opposite direction, what is assumed of two workers of one host, of two hosts. Two workers are of one
host when they announce the same one in their address, or when either reads the other's memory
directly. A reader that says it has no way to a peer is believed: the link gets a price that
nobody pays while there is another one.

Does not know: sessions, requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from baton.core.fabric import LinkReport
from services.router.placement.policy_config import PolicyConfig

NO_LINK_S = 60.0
"""Latency put on a link that a reader says it does not have. Finite, so that costs stay numbers."""
TELLING_CHANGE = 0.1
"""Measurements wander; a change below this share is none."""
ONE_HOST_TRANSPORTS = frozenset({"mapped", "shm"})
ONE_HOST_LANES = ("cma", "cuda_ipc", "mapped memory")


@dataclass(frozen=True, slots=True)
class LinkPrices:
    """What is assumed of links that nobody has measured, and what using any link costs beside."""

    bytes_per_second: float = 1e9
    latency_s: float = 0.001
    host_bytes_per_second: float = 5e9
    """Between workers of one host."""
    fetch_s: float = 0.002
    handoff_s: float = 0.003

    @classmethod
    def from_config(cls, config: PolicyConfig) -> LinkPrices:
        return cls(
            config.link_bytes_per_second,
            config.link_latency_s,
            config.host_link_bytes_per_second,
            config.fetch_s,
            config.handoff_s,
        )


def host_of(address: str) -> str:
    """The host part of `host:port`."""
    return address.rpartition(":")[0]


def is_one_host(link: LinkReport) -> bool:
    """The reader reaches the peer's memory itself: they share a host, or a domain of NVLink."""
    if link.transport in ONE_HOST_TRANSPORTS:
        return True
    return any(lane in link.lane for lane in ONE_HOST_LANES)


class Topology:
    """Links between numbered rows; a row is cleared before it is another worker's."""

    def __init__(self, prices: LinkPrices, *, capacity: int) -> None:
        self.prices = prices
        self.version = 0
        """Changes when any cost does."""
        self._measured = np.zeros((2, capacity, capacity))
        """[seconds per byte | latency][reader, source]; 0 seconds per byte: not measured."""
        self._is_denied = np.zeros((capacity, capacity), bool)
        self._domain = np.full(capacity, -1, np.int64)
        """One number for all workers of one host."""
        self._host_domain: dict[str, int] = {}
        self._hosts: dict[int, str] = {}
        self._next_domain = 0

    def grow(self, capacity: int) -> None:
        old = len(self._domain)
        measured = np.zeros((2, capacity, capacity))
        measured[:, :old, :old] = self._measured
        is_denied = np.zeros((capacity, capacity), bool)
        is_denied[:old, :old] = self._is_denied
        domain = np.full(capacity, -1, np.int64)
        domain[:old] = self._domain
        self._measured, self._is_denied, self._domain = measured, is_denied, domain

    def join(self, row: int, host: str) -> None:
        """A worker on `host` takes an empty row."""
        if host not in self._host_domain:
            self._host_domain[host] = self._new_domain()
        self._domain[row] = self._host_domain[host]
        self._hosts[row] = host
        self.version += 1

    def leave(self, row: int) -> None:
        self._measured[:, row, :] = 0.0
        self._measured[:, :, row] = 0.0
        self._is_denied[row, :] = False
        self._is_denied[:, row] = False
        self._domain[row] = -1
        host = self._hosts.pop(row)
        if host not in self._hosts.values():
            del self._host_domain[host]
        self.version += 1

    def report(self, reader: int, source: int, link: LinkReport) -> None:
        """What the worker of row `reader` says of its link to the one of `source`."""
        is_denied = not link.transport and bool(link.reason)
        changed = is_denied != bool(self._is_denied[reader, source])
        self._is_denied[reader, source] = is_denied
        if not is_denied and is_one_host(link):
            changed |= self._join_domains(reader, source)
        if link.bytes_per_second > 0 and not is_denied:
            new = 1.0 / link.bytes_per_second, max(0.0, link.latency_s)
            old = self._measured[0, reader, source], self._measured[1, reader, source]
            if any(abs(a - b) > TELLING_CHANGE * b for a, b in zip(new, old, strict=True)):
                self._measured[:, reader, source] = new
                changed = True
        if changed:
            self.version += 1

    def is_near(self, a: int, b: int) -> bool:
        """Whether two rows are of one host, as far as is known."""
        return bool(self._domain[a] == self._domain[b])

    def costs(
        self, readers: NDArray[np.intp], sources: NDArray[np.intp]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(seconds per byte, latency), each [num_sources, num_readers]."""
        prices = self.prices
        pick = np.ix_(sources, readers)
        near = self._domain[sources][:, None] == self._domain[readers][None, :]
        seconds = np.where(near, 1.0 / prices.host_bytes_per_second, 1.0 / prices.bytes_per_second)
        latency = np.full_like(seconds, prices.latency_s)
        per_byte, delay = self._measured
        # The reverse direction first, so that the reader's own measurement is what stays.
        for measured, measured_delay in ((per_byte, delay), (per_byte.T, delay.T)):
            is_known = measured[pick] > 0
            seconds = np.where(is_known, measured[pick], seconds)
            latency = np.where(is_known, measured_delay[pick], latency)
        latency = np.where(self._is_denied.T[pick], latency + NO_LINK_S, latency)
        return np.ascontiguousarray(seconds), np.ascontiguousarray(latency)

    def _new_domain(self) -> int:
        self._next_domain += 1
        return self._next_domain

    def _join_domains(self, a: int, b: int) -> bool:
        kept, other = int(self._domain[a]), int(self._domain[b])
        if kept == other:
            return False
        self._domain[self._domain == other] = kept
        self._host_domain = {
            host: kept if domain == other else domain for host, domain in self._host_domain.items()
        }
        return True
