"""What the machine itself can do: the rates that transports are compared with."""

from __future__ import annotations

import multiprocessing
import socket
import time

import numpy as np
from numpy.typing import NDArray

SEND_BYTES = 1 << 20
CONNECT_TIMEOUT_S = 30.0


def memcpy_rate(
    source: NDArray[np.uint8], target: NDArray[np.uint8], there: list[int], here: list[int]
) -> float:
    """Bytes per second of copying rows source[there[i]] to target[here[i]], one thread."""
    started_s = time.perf_counter()
    for i, j in zip(there, here, strict=True):
        np.copyto(target[j], source[i])
    return len(there) * int(source.shape[1]) / (time.perf_counter() - started_s)


class RawSocket:
    """A process that sends plain bytes over one loopback connection: the limit of any TCP
    transport. A context manager."""

    def __init__(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        listener.settimeout(CONNECT_TIMEOUT_S)
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_send_all, args=(listener.getsockname(),))
        self._process.start()
        self._connection, _ = listener.accept()
        self._connection.settimeout(CONNECT_TIMEOUT_S)
        listener.close()

    def rate(self, target: NDArray[np.uint8], num_bytes: int) -> float:
        """Bytes per second of receiving into `target`, over and over."""
        view = memoryview(target.reshape(-1)).cast("B")
        started_s = time.perf_counter()
        self._connection.sendall(num_bytes.to_bytes(8, "big"))
        left = num_bytes
        while left:
            left -= self._connection.recv_into(view[: min(left, len(view))])
        return num_bytes / (time.perf_counter() - started_s)

    def __enter__(self) -> RawSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join(CONNECT_TIMEOUT_S)


def _send_all(address: tuple[str, int]) -> None:
    data = memoryview(bytes(SEND_BYTES))
    with socket.create_connection(address) as connection:
        while wanted := connection.recv(8, socket.MSG_WAITALL):
            left = int.from_bytes(wanted, "big")
            while left:
                left -= connection.send(data[: min(left, SEND_BYTES)])
