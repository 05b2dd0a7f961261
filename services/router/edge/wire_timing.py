"""A request's time line as a gRPC client gets it."""

from __future__ import annotations

from baton.rpc.v1 import inference_pb2 as pb
from services.router.requests.timing import RequestTiming


def timing_to_wire(timing: RequestTiming) -> pb.Timing:
    prefill, transfer, decode = timing.prefill, timing.transfer, timing.decode
    return pb.Timing(
        placed_ms=timing.placed_ms,
        ttft_ms=timing.ttft_ms,
        total_ms=timing.total_ms,
        mean_itl_ms=timing.mean_itl_ms,
        prefill=None
        if prefill is None
        else pb.PrefillTiming(
            worker_id=prefill.worker,
            queue_ms=prefill.queue_ms,
            compute_ms=prefill.compute_ms,
            num_chunks=prefill.num_chunks,
            engine_ms=prefill.engine_ms,
            cached_tokens=prefill.cached_tokens,
        ),
        transfer=None
        if transfer is None
        else pb.TransferTiming(
            ms=transfer.ms,
            exposed_ms=transfer.exposed_ms,
            num_bytes=transfer.num_bytes,
            num_reads=transfer.num_reads,
        ),
        decode=None
        if decode is None
        else pb.DecodeTiming(
            worker_id=decode.worker,
            decode_ms=decode.decode_ms,
            num_steps=decode.num_steps,
            engine_ms=decode.engine_ms,
        ),
        num_failures=timing.num_failures,
        num_moves=timing.num_moves,
    )
