"""The one-shot all-reduce of a process group: its symmetric memory, its failure, its abort.

Setting up maps every rank's buffer in every process (torch's symmetric memory); calls are those
of `kernels.one_shot_all_reduce`, which holds the protocol. Start processes with
TORCH_SYMM_MEM_DISABLE_MULTICAST=1: NVLink multicast is not used.
"""

from __future__ import annotations

import torch
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor
from torch.distributed import ProcessGroup

from kernels.one_shot_all_reduce import (
    ABORTED,
    DEFAULT_DEADLINE_S,
    DEFAULT_MAX_BYTES,
    FAILED,
    NO_RANK,
    Peers,
    buffer_bytes,
    make_peers,
    one_shot_all_reduce,
    signals_of,
)


class OneShotAllReduce:
    """The sum over one group whose GPUs have each other's memory mapped."""

    __slots__ = ("_abort_stream", "_aborted", "_mapping", "_peers", "deadline_s")

    def __init__(
        self,
        peers: Peers,
        *,
        deadline_s: float = DEFAULT_DEADLINE_S,
        mapping: object = None,
    ) -> None:
        """`mapping` is what keeps the others' buffers mapped, if anything must be held."""
        self._peers = peers
        self._mapping = mapping
        self.deadline_s = deadline_s
        """Of each call; a captured graph keeps the one it was captured with."""
        device = peers.buffer.device
        self._abort_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Allocated now: pinning memory waits for running kernels, which an abort must not.
        is_pinned = device.type == "cuda"
        self._aborted = (
            torch.full((1,), ABORTED, dtype=torch.int32, pin_memory=is_pinned),
            torch.full((1,), FAILED.value, dtype=torch.int32, pin_memory=is_pinned),
            torch.full(signals_of(peers).shape, 1 << 62, dtype=torch.int64, pin_memory=is_pinned),
        )

    @classmethod
    def connect(
        cls,
        group: ProcessGroup,
        *,
        device: torch.device,
        max_bytes: int = DEFAULT_MAX_BYTES,
        deadline_s: float = DEFAULT_DEADLINE_S,
    ) -> OneShotAllReduce:
        """Allocate and map the buffers; collective, every rank of the group calls it.

        Raises RuntimeError from torch where the GPUs cannot map each other's memory.
        """
        num_bytes = buffer_bytes(max_bytes, group.size())
        buffer = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
        buffer.zero_()
        # No rank leaves the rendezvous before all have entered it, with their signals at zero.
        torch.cuda.synchronize(device)
        mapping = symmetric_memory.rendezvous(buffer, group)
        mapped = [mapping.get_buffer(r, (num_bytes,), torch.uint8) for r in range(group.size())]
        addresses = tuple(peer.data_ptr() for peer in mapped)
        peers = make_peers(buffer, addresses, rank=mapping.rank, max_bytes=max_bytes)
        return cls(peers, deadline_s=deadline_s, mapping=mapping)

    @property
    def max_bytes(self) -> int:
        """The longest message; longer ones take the group's own way."""
        return self._peers.max_bytes

    @property
    def failed_rank(self) -> Tensor:
        """[1] int32 on the device, copied to the host with a step's results; NO_RANK at first."""
        return self._peers.failed_rank

    def __call__(
        self,
        x: Tensor,
        *,
        out: Tensor | None = None,
        residual: Tensor | None = None,
        launch_pdl: bool = False,
    ) -> Tensor:
        """Sum x over the ranks, plus this rank's residual; see one_shot_all_reduce."""
        return one_shot_all_reduce(
            x,
            self._peers,
            out=out,
            residual=residual,
            deadline_s=self.deadline_s,
            launch_pdl=launch_pdl,
        )

    def all_reduce_(self, x: Tensor) -> Tensor:
        """Sum x over the ranks in place; returned. Part of a chain of dependent launches."""
        return self(x, out=x, launch_pdl=True)

    def raise_if_failed(self) -> None:
        """Wait for the device; raise TimeoutError if a rank was missed or the group aborted."""
        rank = int(self._peers.failed_rank.item())
        if rank == ABORTED:
            raise TimeoutError("the group's all-reduce was aborted; restart the group")
        if rank != NO_RANK:
            raise TimeoutError(
                f"rank {rank} of {len(self._peers.addresses)} did not reach an all-reduce within "
                f"about {self.deadline_s:g} s; restart the group"
            )

    def abort(self) -> None:
        """End the running call and all later ones of this rank at once, with NaN; any thread may.

        The copy engine writes what the waiting kernel looks for: no SM need be free.
        """
        peers = self._peers
        targets = (peers.failed_rank, peers.state, signals_of(peers))
        with torch.cuda.stream(self._abort_stream):
            for target, value in zip(targets, self._aborted, strict=True):
                target.copy_(value, non_blocking=True)
