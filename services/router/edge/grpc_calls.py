"""What every call of the gRPC front needs: its metadata, its end with an error, and the refusal of
messages that have fields nobody knows."""

from __future__ import annotations

import asyncio
import logging

import grpc
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from baton.core.errors import BatonError, InvalidRequest, Overloaded
from baton.rpc.channel import grpc_status
from services.router.openai_api.error_body import retry_headers
from services.router.requests.generation import Generator
from services.router.tenants.tenants import HeaderOf

logger = logging.getLogger(__name__)

MAX_NAMED_UNKNOWN_BYTES = 4096
"""More than this is refused without looking for a field to name."""
HEALTH_TIMEOUT_S = 2.0


async def is_ready(generator: Generator) -> bool:
    """What `generator` says of its health; False if it does not say it in time."""
    try:
        async with asyncio.timeout(HEALTH_TIMEOUT_S):
            return (await generator.health()).is_ready
    except TimeoutError:
        return False
    except Exception:
        logger.exception("the health check failed")
        return False


def end_with(context: grpc.aio.ServicerContext, error: Exception, request_id: str) -> None:
    """End the call with the status of `error`, and when to come back if that is known."""
    if not isinstance(error, BatonError):
        logger.error("gRPC request %s failed", request_id, exc_info=error)
    metadata = retry_headers(error)
    if isinstance(error, Overloaded):
        # Obeyed by gRPC clients that have a retry policy.
        metadata.append(("grpc-retry-pushback-ms", dict(metadata)["retry-after-ms"]))
    if metadata:
        context.set_trailing_metadata(tuple(metadata))
    # Not `abort`: the call and what that raises would keep each other, and so the prompt.
    code, message = grpc_status(error)
    context.set_code(code)
    context.set_details(message)


def metadata_of(context: grpc.aio.ServicerContext) -> HeaderOf:
    metadata = {str(key): value for key, value in context.invocation_metadata() or ()}

    def value_of(name: str) -> str:
        value = metadata.get(name, "")
        return value if isinstance(value, str) else value.decode("latin-1")

    return value_of


def refuse_unknown_fields(message: Message) -> None:
    """Raises InvalidRequest. Listing unknown fields costs half a microsecond for each and looking
    for them in Python more, so sizes are compared first."""
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    num_bytes = message.ByteSize() - known.ByteSize()
    name = message.DESCRIPTOR.name
    if num_bytes > MAX_NAMED_UNKNOWN_BYTES:
        raise InvalidRequest(
            f"{name} has {num_bytes} bytes of unknown fields; "
            "compare the client's .proto with the server's reflection",
            param=name,
        )
    if num_bytes:
        _name_unknown_field(message, name)


def _name_unknown_field(message: Message, name: str) -> None:
    """Raises InvalidRequest with the field's number, for there is no name to give."""
    unknown = UnknownFieldSet(message)
    if len(unknown):
        raise InvalidRequest(
            f"{name} has no field number {unknown[0].field_number}; "
            "compare the client's .proto with the server's reflection",
            param=name,
        )
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        inner = f"{name}.{field.name}"
        for entry in value if field.is_repeated else (value,):
            _name_unknown_field(entry, inner)
