"""Group-wise symmetric int4 weights, packed four to an int16 for the int4 kernels.

A row of K weights is cut into chunks of four planes; a plane is PLANE = min(group_size, 64)
neighbouring weights, which share one scale. Word j of a chunk holds weight j of every plane:

    bits     15-12    11-8      7-4       3-0
    word j   plane 3  plane 2   plane 1   plane 0      each as q + 8, 0-15 (q in -8..7)

so that one AND and one OR turn two neighbouring words into two neighbouring weights of a plane as
bfloat16. The last chunk is filled with zeros.

Rows may be cut between any packed rows; a cut along K is made before packing.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP_SIZES = (32, 64, 128)
NUM_PLANES = 4
ZERO_POINT = 8


def plane_size(group_size: int) -> int:
    """Neighbouring weights that one nibble of neighbouring words holds.

    Raises: ValueError for a group size that has no kernel.
    """
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size}, it must be one of {GROUP_SIZES}")
    return min(group_size, 64)


def packed_width(k: int, group_size: int) -> int:
    """int16 words in a packed row of `k` weights."""
    plane = plane_size(group_size)
    return -(-k // (NUM_PLANES * plane)) * plane


def pack_int4(q: Tensor, *, group_size: int) -> Tensor:
    """int16 [N, packed_width] of int8 weights [N, K] in -8..7.

    Raises: ValueError for a wrong dtype, value or group size.
    """
    if q.dtype != torch.int8 or q.dim() != 2:
        raise ValueError(f"q is {q.dtype} {tuple(q.shape)}, it must be int8 [N, K]")
    if q.numel() and (int(q.min()) < -8 or int(q.max()) > 7):
        raise ValueError(f"q spans {int(q.min())}..{int(q.max())}, int4 holds -8..7")
    num_rows, k = q.shape
    plane = plane_size(group_size)
    width = packed_width(k, group_size)
    padded = torch.nn.functional.pad(q, (0, width * NUM_PLANES - k)) + ZERO_POINT
    nibbles = padded.view(num_rows, -1, NUM_PLANES, plane).to(torch.int32)
    words = torch.zeros(num_rows, width // plane, plane, dtype=torch.int32, device=q.device)
    for i in range(NUM_PLANES):
        words |= nibbles[:, :, i] << (4 * i)
    # To int16 by bits: words from 2^15 on become negative.
    return (words - ((words >> 15) << 16)).to(torch.int16).view(num_rows, width)


def unpack_int4(packed: Tensor, k: int, *, group_size: int) -> Tensor:
    """int8 [N, K] of packed words; the inverse of `pack_int4`."""
    plane = plane_size(group_size)
    words = packed.to(torch.int32).view(packed.shape[0], -1, 1, plane)
    shifts = 4 * torch.arange(NUM_PLANES, device=packed.device, dtype=torch.int32)
    nibbles = (words >> shifts[None, None, :, None]) & 15
    q = (nibbles - ZERO_POINT).to(torch.int8)
    return q.reshape(packed.shape[0], -1)[:, :k].contiguous()
