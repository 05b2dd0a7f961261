"""Whether a pool is left with a worker when this one leaves it.

A worker first tells the registries that it counts to the other pool, and then looks who is left:
of two that leave at the same time at least one so sees the other gone. Who is left is then asked,
since a registry does not know who drains.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

import grpc

from baton.core.errors import BatonError, RoleChangeRefused
from baton.core.tls import TlsFiles
from baton.core.worker_info import Role, WorkerInfo
from baton.registry.registry import Registry
from baton.rpc.channel import open_channel
from baton.rpc.convert import role_to_wire
from baton.rpc.v1 import worker_pb2 as pb
from baton.rpc.v1.worker_pb2_grpc import WorkerStub

ANSWER_S = 5.0
"""A worker answers between two of its steps."""
MAX_ASKED = 4
"""At once. A pool of which so many do not answer is no pool to rely on."""


class PoolMates:
    """The other workers, as the registries know them."""

    def __init__(
        self,
        registries: Sequence[Registry],
        *,
        ttl_s: float,
        is_shared: Collection[bool],
        tls: TlsFiles | None,
    ) -> None:
        """`is_shared`: for each registry whether workers of other hosts and containers are in it,
        so that its silence means something."""
        self._registries = tuple(registries)
        self._shared = tuple(r for r, s in zip(registries, is_shared, strict=True) if s)
        self._ttl_s = ttl_s
        self._tls = tls

    async def announce(self, info: WorkerInfo) -> None:
        """Raises Unavailable when a registry does not answer."""
        for registry in self._registries:
            await registry.register(info, ttl_s=self._ttl_s)

    async def check_some_are_left(self, myself: WorkerInfo, pool: Role) -> None:
        """Raises RoleChangeRefused unless a worker of `pool` for this model takes work."""
        if not self._shared:
            raise RoleChangeRefused(
                f"no registry says whether another {pool.value} worker is left (registry.url and "
                "registry.directory are not set); ask with --may-empty-pool if one is"
            )
        found: dict[str, WorkerInfo] = {}
        for registry in self._shared:
            try:
                listed = await registry.list()
            except BatonError as error:
                raise RoleChangeRefused(
                    f"whether another {pool.value} worker is left cannot be seen: {error}; ask "
                    "again, or with --may-empty-pool"
                ) from error
            found.update((str(name), info) for name, info in listed.items())
        left = [
            info
            for info in found.values()
            if info.role is pool
            and info.worker_id != myself.worker_id
            and info.model_name == myself.model_name
        ]
        if await self._any_takes_work(left[:MAX_ASKED], pool):
            return
        raise RoleChangeRefused(
            f"it is the last {pool.value} worker that takes work for {myself.model_name} "
            f"({len(left)} others are registered); start another one first, or ask with "
            "--may-empty-pool"
        )

    async def _any_takes_work(self, workers: Sequence[WorkerInfo], pool: Role) -> bool:
        asking = [asyncio.create_task(self._takes_work(info, pool)) for info in workers]
        try:
            for answer in asyncio.as_completed(asking):
                if await answer:
                    return True
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        return False

    async def _takes_work(self, info: WorkerInfo, pool: Role) -> bool:
        try:
            async with asyncio.timeout(ANSWER_S), open_channel(info.address, self._tls) as channel:
                welcome = await WorkerStub(channel).GetInfo(pb.GetInfoRequest())
        except (TimeoutError, grpc.aio.AioRpcError):
            return False
        load = welcome.load
        is_there = welcome.info.role == role_to_wire(pool)
        return is_there and not (load.is_draining or load.is_unhealthy)
