"""Whom each worker may have to read KV from. Pure.

Prefill workers read prefixes, decode workers prompts, and both what they take over: any worker
may be asked to read from any other whose blocks it can use. Told early, they connect before the
first request needs the link.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from baton.core.kv_layout import KvLayout
from baton.core.request import PeerRef
from baton.core.worker_info import WorkerInfo


def peers_of(workers: Collection[WorkerInfo]) -> Mapping[WorkerInfo, tuple[PeerRef, ...]]:
    """For each of `workers` all others of its model and layout, in order of their ids.

    Block sizes may differ: which of them go together the workers decide. Being left out here would
    make a worker a stranger to the others.
    """
    groups: dict[tuple[str, KvLayout], list[WorkerInfo]] = {}
    for info in sorted(workers, key=lambda w: w.worker_id):
        layout = dataclasses.replace(info.layout, block_size=1)
        groups.setdefault((info.model_name, layout), []).append(info)
    return {
        info: tuple(
            PeerRef(peer.worker_id, peer.epoch, peer.address) for peer in group if peer is not info
        )
        for group in groups.values()
        for info in group
    }
