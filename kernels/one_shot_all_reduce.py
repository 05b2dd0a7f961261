"""Sum over the GPUs of one host, for messages too small to be worth a ring.

    out = x_0 + x_1 + ... + x_(ranks - 1) (+ residual)       float32 inside, rounded once

Every rank reads every rank's contribution and adds them in the same order, so all ranks hold the
same bits. x, residual and out are contiguous and of one shape in bfloat16, float16 or float32.

Symmetric memory: each rank owns a buffer that all others have mapped, laid out as

    signals [MAX_PROGRAMS, world_size] int64 | data of even calls | data of odd calls

Life of call number e (the epoch, counted on the device, so that a replayed graph counts on):
  1. publish: program p of rank r copies its tile of x into r's own data area of e's parity, then
     writes e into signals[p, r] of every rank, its own included.
  2. reduce: program p waits until its own rank's signals[p, :] are all >= e, then reads its tile
     from all ranks' data areas and writes the sum.
     Meanwhile the rank's last program to have read the epoch moves it on to e.
Two data areas are enough: whoever writes the area of e + 2 has finished call e + 1, so has heard
from every rank that it began e + 1, so that its call e, which read the same area, was over.

A rank that died is never heard from. Each wait is bounded: past the deadline, or when the host
aborts, the kernel stores the missing rank in `failed_rank`, and this and all later calls return
NaN without waiting. Who watches the ranks' processes notices sooner; `failed_rank` says who it was.

Bytes of a rank: num_bytes * (world_size - 1) over its links, num_bytes * 4 locally. Bound: the
latency of one signal and one read over a link.
Limits: 2..16 ranks; the calls of a rank follow each other on one stream.
Source: the memory orders are those of the PTX ISA, chapter "Memory Consistency Model".
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Flag, auto
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.platform import is_interpreted, runs_triton

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_PROGRAMS = 128
MAX_RANKS = 16
DEFAULT_MAX_BYTES = 512 * 1024
DEFAULT_DEADLINE_S = 20.0
"""Longer than any pause of a healthy rank between two launches."""
POLLS_PER_S = 1_000_000
"""A poll is one atomic at system scope, about a microsecond. Counted instead of timed: a clock
reads differently in each thread of a program, and all of them must leave the loop together."""
NO_RANK = -1
ABORTED = MAX_RANKS
NO_RANK_VALUE = tl.constexpr(NO_RANK)
FAILED = tl.constexpr(1 << 30)


class Phase(Flag):
    """Parts of a call; apart only where one process plays all ranks in turn."""

    PUBLISH = auto()
    REDUCE = auto()


def one_shot_all_reduce_reference(
    contributions: list[Tensor], *, residual: Tensor | None = None
) -> Tensor:
    """What every rank gets from the x of all, given in rank order; plain torch, float32 inside."""
    total = torch.zeros_like(contributions[0], dtype=torch.float32)
    for x in contributions:
        total += x.float()
    if residual is not None:
        total += residual.float()
    return total.to(contributions[0].dtype)


@dataclass(frozen=True, slots=True)
class Peers:
    """One rank's view of the group's symmetric memory, and its own counters."""

    rank: int
    max_bytes: int
    """Of one message."""
    addresses: tuple[int, ...]
    """Where each rank's buffer is mapped in this process."""
    buffer: Tensor
    """[buffer_bytes] uint8: this rank's own, which the others read as long as it lives."""
    epoch: Tensor
    """[1] int64: the last call."""
    state: Tensor
    """[1] int32: programs of the running call that have read the epoch; plus FAILED."""
    failed_rank: Tensor
    """[1] int32: a rank that missed its deadline, ABORTED, or NO_RANK while all is well."""


def buffer_bytes(max_bytes: int, world_size: int) -> int:
    """Length of a rank's symmetric buffer: signals and two data areas."""
    return MAX_PROGRAMS * world_size * 8 + 2 * max_bytes


def make_peers(
    buffer: Tensor, addresses: tuple[int, ...], *, rank: int, max_bytes: int = DEFAULT_MAX_BYTES
) -> Peers:
    """A group that has made no call. Every rank's buffer holds zeros before any rank's first.

    Raises ValueError on a group or size that the kernel does not take.
    """
    if not 2 <= len(addresses) <= MAX_RANKS or not 0 <= rank < len(addresses):
        raise ValueError(f"rank {rank} of {len(addresses)}; give 2..{MAX_RANKS} ranks")
    if max_bytes <= 0 or max_bytes % 16:
        raise ValueError(f"max_bytes is {max_bytes}; give a positive multiple of 16")
    num_bytes = buffer_bytes(max_bytes, len(addresses))
    if buffer.dtype != torch.uint8 or buffer.shape != (num_bytes,):
        raise ValueError(f"buffer is {list(buffer.shape)} {buffer.dtype}; give [{num_bytes}] uint8")
    device = buffer.device
    return Peers(
        rank=rank,
        max_bytes=max_bytes,
        addresses=addresses,
        buffer=buffer,
        epoch=torch.zeros(1, dtype=torch.int64, device=device),
        state=torch.zeros(1, dtype=torch.int32, device=device),
        failed_rank=torch.full((1,), NO_RANK, dtype=torch.int32, device=device),
    )


def signals_of(peers: Peers) -> Tensor:
    """[MAX_PROGRAMS * world_size] int64: who has reached which call, as this rank is told."""
    return peers.buffer[: MAX_PROGRAMS * len(peers.addresses) * 8].view(torch.int64)


class Tile(NamedTuple):
    elements: int
    num_warps: int


def _tile(num_bytes: int, itemsize: int) -> Tile:
    """16 bytes a thread and rank; no more programs than there are signals for."""
    tile_bytes, num_warps = 2048, 4
    while triton.cdiv(num_bytes, tile_bytes) > MAX_PROGRAMS:
        tile_bytes *= 2
        num_warps = min(num_warps * 2, 16)
    return Tile(tile_bytes // itemsize, num_warps)


@triton.jit(do_not_specialize=["max_polls"])
def _one_shot_all_reduce_kernel(
    x_ptr,  # [num_elements]
    residual_ptr,  # [num_elements] or None
    out_ptr,  # [num_elements]
    epoch_ptr,  # [1]
    state_ptr,  # [1]
    failed_rank_ptr,  # [1]
    addresses,  # WORLD_SIZE numbers; arguments, so that no load precedes the first signal
    num_elements,
    area_bytes: tl.int64,
    max_polls: tl.int64,
    RANK: tl.constexpr,
    WORLD_SIZE: tl.constexpr,
    RANKS: tl.constexpr,
    SIGNAL_BYTES: tl.constexpr,
    TILE: tl.constexpr,
    PUBLISHES: tl.constexpr,
    REDUCES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    # One program a tile; program p of a rank hears from program p of each rank.
    program = tl.program_id(0)
    offsets = program * TILE + tl.arange(0, TILE)  # [TILE]
    is_inside = offsets < num_elements
    ranks = tl.arange(0, RANKS)  # [RANKS], a power of two
    is_rank = ranks < WORLD_SIZE
    element: tl.constexpr = x_ptr.dtype.element_ty
    buffers = tl.zeros((RANKS,), dtype=tl.int64)
    for rank in tl.static_range(WORLD_SIZE):
        buffers = tl.where(ranks == rank, addresses[rank], buffers)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    epoch = tl.load(epoch_ptr) + 1
    area = SIGNAL_BYTES + (epoch % 2) * area_bytes

    if PUBLISHES:
        x = tl.load(x_ptr + offsets, mask=is_inside, other=0.0)
        own_ptr = tl.multiple_of((addresses[RANK] + area).to(tl.pointer_type(element)), 16)
        tl.store(own_ptr + offsets, x, mask=is_inside)
        # Some threads signal, all have stored. The barrier puts those stores before the signals
        # inside the program; a release is cumulative, so it carries that order to the peers.
        tl.debug_barrier()
        signal_ptrs = buffers.to(tl.pointer_type(tl.int64)) + program * WORLD_SIZE + RANK
        # Release at system scope: whoever acquires this value on any GPU sees the tile. It also
        # says that this rank's reads of earlier calls are over, which frees their data areas.
        tl.atomic_xchg(signal_ptrs, epoch, mask=is_rank, sem="release", scope="sys")

    if REDUCES:
        # Each program counts itself once it has read the epoch, and the last one moves it on while
        # all wait for the peers. Relaxed will do: the barrier above puts a program's reads of the
        # epoch before its count, so none is left to see the store; the next call comes after it
        # on the stream. The same word tells every thread alike that the group has failed: a plain
        # load might tell some, and they would leave the others at the loop's barriers.
        state = tl.atomic_add(state_ptr, 1, sem="relaxed", scope="gpu")
        if (state & (FAILED - 1)) == tl.num_programs(0) - 1:
            tl.atomic_add(state_ptr, -tl.num_programs(0), sem="relaxed", scope="gpu")
            tl.store(epoch_ptr, epoch)
        signals_ptr = addresses[RANK].to(tl.pointer_type(tl.int64)) + program * WORLD_SIZE
        is_missing = is_rank & (state < FAILED)
        num_polls = max_polls * 0
        while (tl.max(is_missing.to(tl.int32), axis=0) > 0) & (num_polls < max_polls):
            # Acquire at system scope, by an atomic that changes nothing: paired with the peer's
            # release it makes the reads below find the peer's tile, and not what this SM's cache
            # holds of the same area from two calls ago. A peer may already be one call ahead.
            arrived = tl.atomic_add(
                signals_ptr + ranks, tl.zeros((RANKS,), tl.int64), is_rank, "acquire", "sys"
            )
            is_missing = is_rank & (arrived < epoch)
            num_polls += 1
        missing = tl.min(tl.where(is_missing, ranks, RANKS), axis=0)
        if missing < RANKS:
            tl.atomic_cas(failed_rank_ptr, NO_RANK_VALUE, missing)
            tl.atomic_or(state_ptr, FAILED)
        # The threads that acquired hand over to all threads of the program.
        tl.debug_barrier()
        total = tl.zeros((TILE,), dtype=tl.float32)
        for rank in tl.static_range(WORLD_SIZE):
            data_ptr = tl.multiple_of((addresses[rank] + area).to(tl.pointer_type(element)), 16)
            total += tl.load(data_ptr + offsets, mask=is_inside, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            total += tl.load(residual_ptr + offsets, mask=is_inside, other=0.0).to(tl.float32)
        # Read after the wait, which an abort ends by signals of its own.
        has_failed = (tl.load(failed_rank_ptr, volatile=True) >= 0) | (missing < RANKS)
        total = tl.where(has_failed, float("nan"), total)
        tl.store(out_ptr + offsets, total.to(element), mask=is_inside)


def one_shot_all_reduce(
    x: Tensor,
    peers: Peers,
    *,
    out: Tensor | None = None,
    residual: Tensor | None = None,
    deadline_s: float = DEFAULT_DEADLINE_S,
    phases: Phase = Phase.PUBLISH | Phase.REDUCE,
    launch_pdl: bool = False,
) -> Tensor:
    """Sum x over the group; every rank makes the same calls in the same order.

    `out` may be x or residual. `phases` other than both serve tests that run one rank after
    another. Raises ValueError on a message the kernel does not take.
    """
    if out is None:
        out = torch.empty_like(x)
    _check(x, peers, out, residual)
    if not x.numel():
        return out
    world_size = len(peers.addresses)
    tile = _tile(x.nbytes, x.element_size())
    use_pdl = launch_pdl and not is_interpreted()
    _one_shot_all_reduce_kernel[(triton.cdiv(x.numel(), tile.elements),)](
        x,
        residual,
        out,
        peers.epoch,
        peers.state,
        peers.failed_rank,
        peers.addresses,
        x.numel(),
        peers.max_bytes,
        max(int(deadline_s * POLLS_PER_S), 1),
        RANK=peers.rank,
        WORLD_SIZE=world_size,
        RANKS=triton.next_power_of_2(world_size),
        SIGNAL_BYTES=MAX_PROGRAMS * world_size * 8,
        TILE=tile.elements,
        PUBLISHES=Phase.PUBLISH in phases,
        REDUCES=Phase.REDUCE in phases,
        USE_PDL=use_pdl,
        num_warps=tile.num_warps,
        launch_pdl=use_pdl,
    )
    return out


def _check(x: Tensor, peers: Peers, out: Tensor, residual: Tensor | None) -> None:
    if x.dtype not in DTYPES or not x.is_contiguous():
        raise ValueError(f"x is {x.dtype}; give contiguous {', '.join(map(str, DTYPES))}")
    if x.nbytes > peers.max_bytes:
        raise ValueError(f"x has {x.nbytes} bytes, the group's buffers {peers.max_bytes}")
    if not runs_triton(x):
        raise ValueError(f"x is on {x.device}; sum over its ranks with the group's own all-reduce")
    if x.device != peers.epoch.device:
        raise ValueError(f"x is on {x.device}, the group on {peers.epoch.device}")
    for name, tensor in (("out", out), ("residual", residual)):
        if tensor is None:
            continue
        if tensor.shape != x.shape or tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"{name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}; "
                f"give {list(x.shape)} {x.dtype} on {x.device} like x"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {list(tensor.stride())}; make it contiguous")
