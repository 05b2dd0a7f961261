"""Who else caches more of a prompt than the worker that is to compute it.

Every worker of a layout can read any other's blocks, so a prefix computed anywhere (a prefill
worker's, or what a decode worker generated a turn ago) need not be computed again. Here it is only
found and offered; the worker weighs reading it against computing it.

Pure: a view and cached lengths in, an offer out. Does not know: hashes, sessions, bandwidth.
"""

from __future__ import annotations

from collections.abc import Mapping

from baton.core.worker_info import WorkerId
from services.router.cluster_view import ClusterView, WorkerState
from services.router.policy import PrefixOffer


def offer(
    view: ClusterView,
    worker_id: WorkerId,
    cached_blocks: Mapping[WorkerId, int],
    *,
    num_prompt_tokens: int,
    min_offer_blocks: int,
) -> PrefixOffer | None:
    """The worker to read leading blocks from, for `worker_id` that computes the prompt.

    `cached_blocks`: leading full blocks of the prompt in each worker's prefix cache. The last
    prompt token is computed in any case, so a block that contains it is worth nothing. Among
    workers that cache equally much the one with the fewest leases is named: it is read least.
    """
    reader = view.get(worker_id)
    if reader is None:
        return None
    usable = (num_prompt_tokens - 1) // reader.info.layout.block_size
    own = min(cached_blocks.get(worker_id, 0), usable)
    best: WorkerState | None = None
    best_key = (0, 0)
    for worker in view.workers:
        info = worker.info
        if info.worker_id == worker_id or not worker.is_readable:
            continue
        if info.layout != reader.info.layout:
            continue
        num_blocks = min(cached_blocks.get(info.worker_id, 0), usable)
        key = (num_blocks, -worker.load.leases)
        if num_blocks - own >= min_offer_blocks and (best is None or key > best_key):
            best, best_key = worker, key
    if best is None:
        return None
    return PrefixOffer(best.info.worker_id, best_key[0], own)
