"""`python -m baton.engine.tensor_parallel.rank FD SERVICE_FD`: a rank's process but the first's.

connect to the other ranks ─► load its part of the model ─► ready ─► run steps until the stream ends

Started by rank 0 alone (`watcher.RankWatcher`), which says everything else over the socket FD and
writes this process's log. What goes wrong is told there, once, and ends the process. The socket
SERVICE_FD is the `rank_service`'s, if there is one.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import socket
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any, NoReturn

from baton.core.errors import ConfigError
from baton.core.logging import log_fields
from baton.engine.host_memory import PoolMemory, map_own_pool
from baton.engine.tensor_parallel.messages import (
    Phase,
    RankError,
    RankLog,
    RankSpec,
    SharedPool,
    Step,
    describe,
)
from baton.engine.tensor_parallel.process import die_with, leave_signals_to_root
from baton.engine.tensor_parallel.rank_log import send_log
from baton.engine.tensor_parallel.rank_service import load_service
from baton.engine.tensor_parallel.rendezvous import Rendezvous, path_of

logger = logging.getLogger("baton.engine.tensor_parallel.rank")
"""By its name for others; here it is the main module."""
EXIT_FAILED = 1


class _RootGone(Exception):
    """Rank 0 has hung up or ended."""


class _Root:
    """The connection to rank 0."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self._connection = Connection(fd)
        self._sending = threading.Lock()

    def receive(self) -> Any:
        """Raises _RootGone."""
        try:
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise _RootGone from error

    def receive_pool(self, num_bytes: int) -> PoolMemory:
        """The memory that rank 0 has made for the whole group's KV pool."""
        shared = self.receive()
        if not isinstance(shared, SharedPool) or shared.num_bytes != num_bytes:
            raise ConfigError(f"rank 0 offers {shared} where {num_bytes} bytes of KV are needed")
        fd = recv_handle(self._connection)
        try:
            return PoolMemory(memoryview(mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED)), None)
        finally:
            os.close(fd)

    def tell(self, message: Phase | RankError | RankLog) -> None:
        """From any thread."""
        # Rank 0 may be gone already; then nobody is left to tell.
        with contextlib.suppress(OSError), self._sending:
            self._connection.send(message)


def main() -> NoReturn:
    leave_signals_to_root()
    root = _Root(int(sys.argv[1]))
    service_socket = _socket(int(sys.argv[2]))
    code = 0
    try:
        spec: RankSpec = root.receive()
        die_with(spec.root_pid)
        send_log(root.tell, spec.log_level)
        _serve(root, spec, service_socket)
    except _RootGone:
        pass
    except BaseException as error:
        root.tell(_last_words(error))
        code = EXIT_FAILED
    # Without ending the libraries: their threads may hang with the rank that was lost.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve(root: _Root, spec: RankSpec, service_socket: socket.socket) -> None:
    from baton.engine.factory import build_rank, connect_ranks, set_threads

    set_threads(spec.config)
    import torch

    root.tell(Phase.CONNECTING)
    communicator = connect_ranks(
        spec.config,
        spec.parallel,
        rendezvous=Rendezvous(path_of(spec.rendezvous_fd)),
        timeout_s=spec.call_timeout_s,
    )
    service = None if spec.service is None else load_service(spec.service, service_socket)
    make_pool = root.receive_pool
    if spec.config.pool_per_rank:
        make_pool = map_own_pool if service is None else service.make_pool
    rank = build_rank(
        spec.config,
        communicator=communicator,
        pool_memory_factory=make_pool,
        num_scratch_blocks=spec.num_scratch_blocks,
    )
    if service is not None:
        service.start(rank.kv)
    log_fields(logger, "ready for steps", pid=os.getpid())
    root.tell(Phase.READY)
    num_threads = 0
    while True:
        step: Step = root.receive()
        if step.num_threads != num_threads:
            num_threads = step.num_threads
            torch.set_num_threads(num_threads)
        rank.runner.run(step.slices)


def _socket(fd: int) -> socket.socket:
    os.set_inheritable(fd, False)
    return socket.socket(fileno=fd)


def _last_words(error: BaseException) -> RankError:
    lines = "".join(traceback.format_exception(error))
    return RankError(describe(error), lines, isinstance(error, ConfigError))


if __name__ == "__main__":
    main()
