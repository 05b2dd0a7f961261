"""Protobuf <-> `kvtransfer.messages`, one function per direction and side."""

from __future__ import annotations

import dataclasses

from baton.core.block import BlockId, join_hashes, split_hashes
from baton.core.request import RequestId
from baton.core.worker_info import Epoch
from baton.rpc.convert import delta_from_wire, delta_to_wire
from baton.rpc.v1 import transfer_pb2 as pb
from kvtransfer.messages import (
    ChunkReady,
    Complete,
    Completed,
    FetchPrefix,
    Freeze,
    GiveUp,
    LayersRead,
    LayersReady,
    LeaseId,
    OwnerMessage,
    ReaderMessage,
    Refused,
    Renew,
    Takeover,
    Watch,
)


def reader_to_wire(message: ReaderMessage) -> pb.ReaderMessage:
    match message:
        case Watch(request_id):
            return pb.ReaderMessage(watch=pb.Watch(request_id=request_id))
        case FetchPrefix(request_id, block_hashes):
            fetch = pb.FetchPrefix(request_id=request_id, block_hashes=join_hashes(block_hashes))
            return pb.ReaderMessage(fetch_prefix=fetch)
        case Takeover(request_id, num_known_tokens):
            takeover = pb.Takeover(request_id=request_id, num_known_tokens=num_known_tokens)
            return pb.ReaderMessage(takeover=takeover)
        case Freeze(request_id):
            return pb.ReaderMessage(freeze=pb.Freeze(request_id=request_id))
        case Renew(lease_id):
            return pb.ReaderMessage(renew=pb.Renew(lease_id=lease_id))
        case Complete(lease_id, epoch):
            return pb.ReaderMessage(complete=pb.Complete(lease_id=lease_id, epoch=epoch))
        case LayersRead(request_id, fill_id):
            read = pb.LayersRead(request_id=request_id, fill_id=fill_id)
            return pb.ReaderMessage(layers_read=read)
        case GiveUp(request_id, reason):
            return pb.ReaderMessage(give_up=pb.GiveUp(request_id=request_id, reason=reason))


def reader_from_wire(message: pb.ReaderMessage) -> ReaderMessage | None:
    """None for kinds that a newer peer may know and this version does not.

    Raises ValueError for hashes that are not whole.
    """
    kind = message.WhichOneof("body")
    if kind == "watch":
        return Watch(RequestId(message.watch.request_id))
    if kind == "fetch_prefix":
        fetch = message.fetch_prefix
        return FetchPrefix(RequestId(fetch.request_id), tuple(split_hashes(fetch.block_hashes)))
    if kind == "takeover":
        takeover = message.takeover
        return Takeover(RequestId(takeover.request_id), takeover.num_known_tokens)
    if kind == "freeze":
        return Freeze(RequestId(message.freeze.request_id))
    if kind == "renew":
        return Renew(LeaseId(message.renew.lease_id))
    if kind == "complete":
        return Complete(LeaseId(message.complete.lease_id), Epoch(message.complete.epoch))
    if kind == "layers_read":
        return LayersRead(RequestId(message.layers_read.request_id), message.layers_read.fill_id)
    if kind == "give_up":
        return GiveUp(RequestId(message.give_up.request_id), message.give_up.reason)
    return None


def owner_to_wire(message: OwnerMessage) -> pb.OwnerMessage:
    match message:
        case ChunkReady():
            return pb.OwnerMessage(chunk=_chunk_to_wire(message))
        case LayersReady():
            return pb.OwnerMessage(layers=_layers_to_wire(message))
        case Completed(lease_id, valid):
            return pb.OwnerMessage(completed=pb.Completed(lease_id=lease_id, valid=valid))
        case Refused(request_id, reason):
            return pb.OwnerMessage(refused=pb.Refused(request_id=request_id, reason=reason))


def owner_from_wire(message: pb.OwnerMessage) -> OwnerMessage | None:
    """None for kinds that a newer peer may know and this version does not."""
    kind = message.WhichOneof("body")
    if kind == "chunk":
        return _chunk_from_wire(message.chunk)
    if kind == "layers":
        return _layers_from_wire(message.layers)
    if kind == "completed":
        return Completed(LeaseId(message.completed.lease_id), message.completed.valid)
    if kind == "refused":
        return Refused(RequestId(message.refused.request_id), message.refused.reason)
    return None


def _chunk_to_wire(chunk: ChunkReady) -> pb.ChunkReady:
    first = chunk.first_token
    if first is not None and first.prompt_logprobs:
        # The router has them; the reader would not pass them on.
        first = dataclasses.replace(first, prompt_logprobs=())
    return pb.ChunkReady(
        request_id=chunk.request_id,
        lease_id=chunk.lease_id,
        epoch=chunk.epoch,
        lease_ms=int(chunk.lease_s * 1000),
        first_block_index=chunk.first_block_index,
        block_ids=chunk.block_ids,
        is_last=chunk.is_last,
        fill_id=chunk.fill_id,
        first_token=None if first is None else delta_to_wire(first),
    )


def _layers_to_wire(layers: LayersReady) -> pb.LayersReady:
    return pb.LayersReady(
        request_id=layers.request_id,
        fill_id=layers.fill_id,
        first_block_index=layers.first_block_index,
        block_ids=layers.block_ids,
        num_layers=layers.num_layers,
    )


def _layers_from_wire(message: pb.LayersReady) -> LayersReady:
    return LayersReady(
        request_id=RequestId(message.request_id),
        fill_id=message.fill_id,
        first_block_index=message.first_block_index,
        block_ids=tuple(BlockId(block_id) for block_id in message.block_ids),
        num_layers=message.num_layers,
    )


def _chunk_from_wire(message: pb.ChunkReady) -> ChunkReady:
    has_token = message.HasField("first_token")
    return ChunkReady(
        request_id=RequestId(message.request_id),
        lease_id=LeaseId(message.lease_id),
        epoch=Epoch(message.epoch),
        lease_s=message.lease_ms / 1000,
        first_block_index=message.first_block_index,
        block_ids=tuple(BlockId(block_id) for block_id in message.block_ids),
        is_last=message.is_last,
        fill_id=message.fill_id,
        first_token=delta_from_wire(message.first_token) if has_token else None,
    )
