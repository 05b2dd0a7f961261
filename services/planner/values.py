"""A chosen candidate as values of the Helm chart."""

from __future__ import annotations

from typing import Any

from baton.core.errors import ConfigError
from services.planner.candidate import Candidate, Pool


def chart_values(candidate: Candidate, *, block_size: int, num_copies: int = 1) -> dict[str, Any]:
    """What differs from the chart's defaults, nested as `helm -f` takes it: `num_copies` pods, each
    with the whole candidate, so that KV passes between GPUs of one host.

    Raises ConfigError for a colocated candidate: the chart deploys pairs of pools.
    """
    if candidate.prefill is None:
        raise ConfigError(
            f"{candidate.name}: the chart deploys a prefill and a decode pool, not a colocated one"
        )
    return {
        "runtime": "ray",
        "config": {
            "prefill": {"engine": _engine(candidate.prefill, block_size)},
            "decode": {"engine": _engine(candidate.decode, block_size)},
        },
        "pools": {
            "layout": "paired",
            "paired": {
                "replicas": num_copies,
                "prefill": candidate.prefill.num_workers,
                "decode": candidate.decode.num_workers,
            },
        },
    }


def _engine(pool: Pool, block_size: int) -> dict[str, Any]:
    return {"device": "cuda", "block_size": block_size, "tp_size": pool.model.tensor_parallel}
