"""What `baton doctor` has seen and what it says of it, as values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from baton.core.fabric import FabricReport, LinkReport
from baton.core.worker_info import LoadReport, WorkerId, WorkerInfo
from baton.registry.directory import RegistryEntry


class Severity(IntEnum):
    """The worst first."""

    ERROR = 0
    """Requests fail, or KV cannot move."""
    WARNING = 1
    """KV moves more slowly or less surely than it should."""
    NOTE = 2
    """Good to know."""


@dataclass(frozen=True, slots=True)
class Finding:
    severity: Severity
    subject: str
    """A worker, a link (`reader <- owner`) or this machine."""
    problem: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at on this machine."""

    name: str
    found: str
    severity: Severity | None = None
    """None: as it should be."""
    fix: str = ""


@dataclass(frozen=True, slots=True)
class WorkerSeen:
    """One worker, asked at its address."""

    address: str
    entry: RegistryEntry | None = None
    """Its registration, where it was found by one."""
    info: WorkerInfo | None = None
    """None: it did not answer."""
    load: LoadReport | None = None
    """When everything else was done: what is still held then is not a passing state."""
    fabric: FabricReport | None = None
    failure: str = ""
    """Why there is no answer, or no fabric report."""
    hashing_problem: str = ""
    """How its names of blocks differ from this release's: scheme, block size or seed."""
    process_state: str = ""
    """As the kernel names it, e.g. stopped; empty where that is not known or it runs."""

    @property
    def name(self) -> str:
        known = self.info or (self.entry.info if self.entry is not None else None)
        return self.address if known is None else str(known.worker_id)


@dataclass(frozen=True, slots=True)
class LinkSeen:
    """One reader and one owner whose KV it may have to read."""

    reader: WorkerId
    owner: WorkerId
    is_near: bool
    """Both run on one host."""
    report: LinkReport | None = None
    """None: not measured."""
    memory_bytes_per_second: float = 0.0
    """Of copies within the reader."""
    failure: str = ""
    """Why it was not measured."""
    is_refused: bool = False
    """The reader did not accept this tool's card."""

    @property
    def name(self) -> str:
        return f"{self.reader} <- {self.owner}"

    @property
    def memory_share(self) -> float:
        """Of the rate of a memory copy; 0 when unknown."""
        if self.report is None or not self.memory_bytes_per_second:
            return 0.0
        return self.report.bytes_per_second / self.memory_bytes_per_second


@dataclass(frozen=True, slots=True)
class Examination:
    """Everything seen in one run."""

    checks: tuple[Check, ...]
    workers: tuple[WorkerSeen, ...]
    links: tuple[LinkSeen, ...]
    is_selection: bool = False
    """The workers were named by hand; there may be others."""
