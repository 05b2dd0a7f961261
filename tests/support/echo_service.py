"""A service of a rank that says what it was given, for tests of `rank_service`."""

from __future__ import annotations

import pickle
import socket

from baton.core.errors import ConfigError
from baton.engine.host_memory import PoolMemory, map_own_pool
from baton.engine.tensor_parallel.rank_service import RankKv


class EchoService:
    """Implements `RankService`; refuses to start when its settings say so."""

    def __init__(self, settings: object, connection: socket.socket) -> None:
        self._settings = settings
        self._connection = connection
        self._pool_bytes = 0

    def make_pool(self, num_bytes: int) -> PoolMemory:
        self._pool_bytes = num_bytes
        return map_own_pool(num_bytes)

    def start(self, kv: RankKv) -> None:
        if self._settings == "refuse":
            raise ConfigError("the service does not like this machine")
        self._connection.sendall(pickle.dumps((self._settings, self._pool_bytes, kv)))
