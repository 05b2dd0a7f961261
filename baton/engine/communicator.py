"""How the ranks of one tensor-parallel group add up, collect and share tensors.

Every rank makes the same calls in the same order with tensors of the same shape and type. On a GPU
they are enqueued on the current stream and can be captured in a CUDA graph; on a CPU they have
ended when the call returns.

Not known here: models, processes, what to do when a rank is lost. Then a call raises, or never
ends until `abort`, after which it may leave anything in its tensor.
"""

from __future__ import annotations

import traceback
from datetime import timedelta
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from baton.core.errors import ConfigError
from baton.engine.parallel import Parallel
from baton.engine.tensor_parallel.rendezvous import Rendezvous

ROOT = 0
"""The rank that schedules and samples."""
CONNECT_TIMEOUT = timedelta(seconds=20)
"""For CPU ranks that are all there to open their sockets."""
LOOPBACK = "127.0.0.1"
"""The ranks of a group share a host."""


class Communicator(Protocol):
    """One rank's end of its group."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...

    def all_reduce_(self, x: Tensor) -> Tensor:
        """Replace contiguous `x` by its sum over all ranks, equal bits everywhere; returns it."""
        ...

    def gather_columns(self, x: Tensor) -> Tensor | None:
        """[num_rows, num_columns] of each rank, all of one width, side by side in rank order.

        Returns [num_rows, size * num_columns] on rank 0 and None on the others.
        """
        ...

    def broadcast_(self, x: Tensor) -> Tensor:
        """Replace contiguous `x` by that of rank 0; returns it."""
        ...

    def barrier(self) -> None:
        """What comes after it on this rank comes after what came before it on every rank."""
        ...

    def smallest(self, value: int) -> int:
        """The least of all ranks' values. Waits for all ranks; not to be captured."""
        ...

    def abort(self) -> None:
        """Make calls that wait for a lost rank return or raise. Called from another thread."""
        ...


class SmallAllReduce(Protocol):
    """A faster sum for small tensors, as `kernels.one_shot_all_reduce` offers between GPUs."""

    @property
    def max_bytes(self) -> int:
        """Larger tensors take the library's way. Equal on all ranks."""
        ...

    def all_reduce_(self, x: Tensor) -> Tensor:
        """As `Communicator.all_reduce_`, for at most `max_bytes`."""
        ...

    def abort(self) -> None:
        """As `Communicator.abort`."""
        ...


class SingleCommunicator:
    """A group of one: every call is the identity."""

    __slots__ = ()
    rank = ROOT
    size = 1

    def all_reduce_(self, x: Tensor) -> Tensor:
        return x

    def gather_columns(self, x: Tensor) -> Tensor | None:
        return x

    def broadcast_(self, x: Tensor) -> Tensor:
        return x

    def barrier(self) -> None:
        """There is nobody to wait for."""

    def smallest(self, value: int) -> int:
        return value

    def abort(self) -> None:
        """Nobody is waited for."""


class DistributedCommunicator:
    """Gloo between CPU processes, NCCL between GPUs."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        rendezvous: Rendezvous,
        timeout: timedelta,
    ) -> None:
        """Takes over `rendezvous`, by which the group's store names its file."""
        self.rank: int = group.rank()
        self.size: int = group.size()
        self._group = group
        self._device = device
        self._rendezvous = rendezvous
        self._small: SmallAllReduce | None = None
        self._token = torch.zeros(1, device=device)
        self._sum = dist.AllreduceOptions()
        self._gather = dist.GatherOptions()
        self._gather.rootRank = ROOT
        self._broadcast = dist.BroadcastOptions()
        self._broadcast.rootRank = ROOT
        self._broadcast.rootTensor = 0
        self._smallest = dist.AllreduceOptions()
        self._smallest.reduceOp = cast(dist.ReduceOp, dist.ReduceOp.MIN)
        for options in (self._sum, self._gather, self._broadcast, self._smallest):
            options.timeout = timeout
        for options in (self._sum, self._gather, self._broadcast):
            # On the current stream, without a stream and events of the library's own.
            options.asyncOp = False

    def __del__(self) -> None:
        # The store writes to its file once more when it goes with the group. Its name, a number,
        # must still be that file's and not of one that was opened since. GPU groups stay.
        if self._device.type == "cpu":
            del self._group
            self._rendezvous.close()

    @classmethod
    def connect(
        cls, parallel: Parallel, *, device: torch.device, rendezvous: Rendezvous, timeout_s: float
    ) -> DistributedCommunicator:
        """Meet the other ranks in the file `rendezvous`, which is empty before the first connects.

        Takes over `rendezvous`. `timeout_s` bounds the meeting and every call on a CPU. A process
        holds one group of GPUs, for as long as it lives. Raises RuntimeError when a rank does not
        come, or the rendezvous is interrupted while it is waited for.
        """
        if device.type not in _BACKENDS:
            rendezvous.close()
            raise ConfigError(f"tp_size {parallel.tp_size} on device {device.type!r}: take cuda")
        store = dist.FileStore(rendezvous.path, parallel.tp_size)
        timeout = timedelta(seconds=timeout_s)
        store.set_timeout(timeout)
        try:
            _wait_for_all(store, parallel)
            group = _BACKENDS[device.type](store, parallel, device, timeout)
        except BaseException as error:
            rendezvous.end_meeting()
            # The store writes once more when it goes: now, and not with whoever holds the error.
            traceback.clear_frames(error.__traceback__)
            del store
            if device.type == "cpu":
                rendezvous.close()
            raise
        rendezvous.end_meeting()
        return cls(group, device, rendezvous, timeout)

    @property
    def group(self) -> dist.ProcessGroup:
        """For what maps the memory of other ranks (GPUs only)."""
        return self._group

    def use_for_small(self, small: SmallAllReduce) -> None:
        """Take `small` for what it can do, from now on. Every rank does, or none."""
        self._small = small

    def all_reduce_(self, x: Tensor) -> Tensor:
        small = self._small
        if small is not None and x.nbytes <= small.max_bytes:
            return small.all_reduce_(x)
        self._wait(self._group.allreduce([x], self._sum))
        return x

    def gather_columns(self, x: Tensor) -> Tensor | None:
        x = x.contiguous()
        if self.rank != ROOT:
            self._wait(self._group.gather([], [x], self._gather))
            return None
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._wait(self._group.gather([parts], [x], self._gather))
        return torch.cat(parts, dim=1)

    def broadcast_(self, x: Tensor) -> Tensor:
        self._wait(self._group.broadcast([x], self._broadcast))
        return x

    def barrier(self) -> None:
        # The library's own would stop the thread on a GPU.
        self.all_reduce_(self._token)

    def smallest(self, value: int) -> int:
        cell = torch.tensor([value], dtype=torch.int64, device=self._device)
        self._wait(self._group.allreduce([cell], self._smallest))
        return int(cell.item())

    def abort(self) -> None:
        if self._small is not None:
            self._small.abort()
        # Gloo needs none: its calls raise as soon as a process at the other end is gone.
        if self._device.type == "cuda":
            self._group.abort()

    @staticmethod
    def _wait(work: dist.Work | None) -> None:
        """Until done on a CPU; on a GPU the stream waits, not the thread."""
        if work is not None:
            work.wait()


def _wait_for_all(store: dist.Store, parallel: Parallel) -> None:
    """Until all ranks are about to connect to each other, which cannot be interrupted.

    In two rounds: a rank that ended while it waited for the last one to come is not in the second.
    """
    for phase in ("come", "all here"):
        store.set(f"{phase}/{parallel.tp_rank}", "")
        store.wait([f"{phase}/{rank}" for rank in range(parallel.tp_size)])


def _gloo_group(
    store: dist.Store, parallel: Parallel, device: torch.device, timeout: timedelta
) -> dist.ProcessGroup:
    """A group that listens on loopback only and is nobody's default.

    Made by hand because `init_process_group` takes the address that the host's name resolves to,
    and keeps one group per process.
    """
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = min(timeout, CONNECT_TIMEOUT)
    options._threads = 1
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
    backend = dist.ProcessGroupGloo(store, parallel.tp_rank, parallel.tp_size, options)
    # It offers the same collectives; the dispatcher between the two would only cost time.
    return cast(dist.ProcessGroup, backend)


def _nccl_group(
    store: dist.Store, parallel: Parallel, device: torch.device, timeout: timedelta
) -> dist.ProcessGroup:
    """The process's default group, which torch's symmetric memory finds by its name."""
    dist.init_process_group(
        "nccl",
        store=store,
        rank=parallel.tp_rank,
        world_size=parallel.tp_size,
        timeout=timeout,
        device_id=device,
    )
    group = dist.group.WORLD
    assert group is not None
    return group


_BACKENDS = {"cpu": _gloo_group, "cuda": _nccl_group}
