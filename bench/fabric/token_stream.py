"""A streaming client over gRPC that keeps the token ids, and when each of them came."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc

from baton.rpc.v1 import inference_pb2 as pb
from baton.rpc.v1 import inference_pb2_grpc, worker_pb2

TIMEOUT_S = 120.0


@dataclass(slots=True)
class TokenStream:
    """What one request was answered."""

    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    """Of each token, on the monotonic clock; tokens of one message share theirs."""
    started_s: float = 0.0

    @property
    def first_token_s(self) -> float:
        return self.times_s[0] - self.started_s


async def stream_tokens(
    port: int,
    prompt: Sequence[int],
    num_tokens: int,
    *,
    on_token: Callable[[int], None] | None = None,
) -> TokenStream:
    """Greedy, without an end before the length. `on_token` is called with the number so far.

    Raises RuntimeError when fewer tokens came, and what gRPC raises.
    """
    sampling = worker_pb2.SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    request = pb.CompletionRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling)
    stream = TokenStream()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await channel.channel_ready()
        stub = inference_pb2_grpc.InferenceStub(channel)
        stream.started_s = time.perf_counter()
        async for delta in stub.Generate(request, timeout=TIMEOUT_S):
            now_s = time.perf_counter()
            stream.token_ids += delta.token_ids
            stream.times_s += [now_s] * len(delta.token_ids)
            if on_token is not None and delta.token_ids:
                on_token(len(stream.token_ids))
    if len(stream.token_ids) != num_tokens:
        raise RuntimeError(f"{len(stream.token_ids)} tokens of {num_tokens} came")
    return stream
