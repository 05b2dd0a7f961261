"""What rank 0 and the other ranks tell each other, over one socket pair each.

    rank 0 ──► RankSpec ──► [SharedPool, with a descriptor] ──► Step ──► Step ... end of stream
           ◄── CONNECTING ◄── READY    RankLog at any time      ◄── RankError, at most once

Values are pickled: both ends are processes of one program, and the socket has no name.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from baton.core.errors import BatonError
from baton.engine.batch import SequenceSlice
from baton.engine.config import EngineConfig
from baton.engine.parallel import Parallel
from baton.engine.tensor_parallel.rank_service import RankServiceSpec


@dataclass(frozen=True, slots=True)
class RankSpec:
    """All a rank must know to start."""

    config: EngineConfig
    parallel: Parallel
    root_pid: int
    rendezvous_fd: int
    """An empty file that all ranks of the group have open, see `Communicator.connect`."""
    call_timeout_s: float
    """Bound on meeting the others and on each collective call of a CPU."""
    log_level: int
    """Below it nothing is logged; see the `logging` module."""
    num_scratch_blocks: int = 0
    """That the pool holds behind the engine's blocks."""
    service: RankServiceSpec | None = None
    """What else runs in the process; it speaks over the process's second socket."""


class Phase(IntEnum):
    """How far a starting rank has come, in order."""

    STARTED = 0
    CONNECTING = 1
    """Libraries are loaded; the rank now meets the others."""
    READY = 2
    """It waits for steps."""


@dataclass(frozen=True, slots=True)
class RankLog:
    """One line for the worker's log."""

    level: int
    logger: str
    text: str
    """With the traceback, if there is one."""
    created_s: float
    """Unix time."""
    fields: tuple[tuple[str, str | int | float | bool | None], ...]
    """See `baton.core.logging.log_fields`."""


@dataclass(frozen=True, slots=True)
class SharedPool:
    """The KV pool's memory, which all ranks map; its descriptor follows."""

    num_bytes: int


class Step(NamedTuple):
    """One step to run."""

    num_threads: int
    """Of the tensor library, as rank 0 has them now; 0 leaves them alone."""
    slices: tuple[SequenceSlice, ...]


@dataclass(frozen=True, slots=True)
class RankError:
    """The last words of a rank."""

    message: str
    """Without paths, for clients."""
    traceback: str
    """For the log."""
    is_config: bool
    """A setting is wrong: starting again will not help."""


def describe(error: BaseException) -> str:
    """For clients: our own messages as they are, of anything else the kind alone."""
    if isinstance(error, BatonError):
        return str(error)
    return f"{type(error).__name__}; the worker's log holds the details"
