"""Asking a running worker to serve in the other pool."""

from __future__ import annotations

import asyncio

import grpc

from baton.core.errors import (
    BatonError,
    DeadlineExceeded,
    InvalidRequest,
    RoleChangeOvertaken,
    RoleChangeRefused,
    Unavailable,
)
from baton.core.tls import TlsFiles
from baton.core.worker_info import Role, WorkerInfo
from baton.rpc.channel import open_channel, unreachable_reason
from baton.rpc.convert import role_to_wire, worker_info_from_wire
from baton.rpc.v1 import worker_pb2 as pb
from baton.rpc.v1.worker_pb2_grpc import WorkerStub

ANSWER_MARGIN_S = 10.0
"""Beyond the time for the requests: the registries and other workers are asked first."""
_ERRORS: dict[grpc.StatusCode, type[BatonError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.FAILED_PRECONDITION: RoleChangeRefused,
    grpc.StatusCode.ABORTED: RoleChangeOvertaken,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}


async def change_role(
    address: str,
    role: Role,
    tls: TlsFiles | None = None,
    timeout_s: float = 30.0,
    *,
    may_empty_pool: bool = False,
) -> WorkerInfo:
    """The worker at `address` serves as `role` when this returns; who it is then.

    `timeout_s`: for its running requests to end or to move; none is ended for the change.
    `may_empty_pool`: also when no worker of the old role is left. Raises RoleChangeRefused,
    RoleChangeOvertaken, DeadlineExceeded or InvalidRequest with the worker's reason, and nothing
    has changed then; Unavailable when it does not answer.
    """
    request = pb.ChangeRoleRequest(
        role=role_to_wire(role),
        timeout_ms=max(1, round(timeout_s * 1000)),
        may_empty_pool=may_empty_pool,
    )
    try:
        async with asyncio.timeout(timeout_s + ANSWER_MARGIN_S), open_channel(address, tls) as to:
            try:
                reply = await WorkerStub(to).ChangeRole(request)
            except grpc.aio.AioRpcError as error:
                raise await _reason(error, address, tls) from None
    except TimeoutError:
        raise Unavailable(
            f"{address} has not answered within {timeout_s + ANSWER_MARGIN_S:g} s; it may still "
            "change its role"
        ) from None
    return worker_info_from_wire(reply.info)


async def _reason(error: grpc.aio.AioRpcError, address: str, tls: TlsFiles | None) -> BatonError:
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return RoleChangeRefused(f"the worker at {address} is of a release without changes of role")
    known = _ERRORS.get(error.code())
    if known is not None:
        return known(error.details() or error.code().name)
    return Unavailable(await unreachable_reason(error, address, tls))
