"""A profile as its file has it, and as a person reads it. Does not know: how it was measured."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from baton.cli.profile_pools import PoolMeasured
from baton.simulator.hardware import Hardware
from services.launch.config import SystemConfig
from services.planner.pool_model import PoolModel
from services.planner.profile_file import profile_json
from services.planner.profiling.fit import StepFit
from services.planner.profiling.overheads import (
    LiveSeen,
    Overheads,
    find_overheads,
    with_telling,
)

GUESSED_START_S = 60.0
"""Of a worker that was not started."""


def profile_of(
    system: SystemConfig, pools: Mapping[str, PoolMeasured], seen: LiveSeen | None
) -> dict[str, Any]:
    """What the file holds. Raises ConfigError."""
    prefill, decode = pools["prefill"], pools["decode"]
    hardware = {name: _hardware(pool.fit) for name, pool in pools.items()}
    shares = {"prefill": 0.0, "decode": 0.0}
    if seen is not None:
        found = find_overheads(
            seen,
            hardware["prefill"],
            hardware["decode"],
            step_tokens=prefill.limits.max_num_batched_tokens,
            kv_bytes=prefill.kv_bytes_per_token,
        )
        shares = {"prefill": found.prefill_neighbour_share, "decode": found.decode_neighbour_share}
        hardware = {
            name: _with_overheads(own, found, shares[name], seen) for name, own in hardware.items()
        }
    start_s = {} if seen is None else seen.start_s
    source = (
        f"measured by baton profile: {system.served_model_name} on {_machine(prefill)}, "
        f"{time.strftime('%Y-%m-%d', time.gmtime())}"
    )
    models = {
        name: PoolModel(
            pool.tp_size,
            hardware[name],
            pool.limits.max_kv_tokens,
            start_s.get(name, GUESSED_START_S),
            source,
        )
        for name, pool in pools.items()
    }
    profile = profile_json(
        models["prefill"],
        models["decode"],
        kv_bytes_per_token=prefill.kv_bytes_per_token,
        source=source,
    )
    for entry, pool in zip(profile["workers"], (prefill, decode), strict=True):
        entry["residuals"] = _residuals(pool)
    profile |= {"model": system.served_model_name, "block_size": prefill.block_size}
    return profile


def print_profile(profile: Mapping[str, Any]) -> None:
    print(profile["source"])
    for entry in profile["workers"]:
        print(f"\n{entry['pool']} worker, tensor parallel {entry['tensor_parallel']}")
        print(
            f"  a step         {_ms(entry['step_fixed_s'])} and {_ms(entry['step_gap_s'])} between"
        )
        print(
            f"  prompt token   {_ms(entry['prefill_token_s'])}, "
            f"and {_ms(1000 * entry['prefill_pair_s'])} for 1,000 tokens before it"
        )
        print(
            f"  decoding       {_ms(entry['decode_sequence_s'])} a sequence, "
            f"and {_ms(1000 * entry['decode_kv_token_s'])} for 1,000 tokens of KV"
        )
        print(f"  room for KV    {entry['max_kv_tokens']:,} tokens")
        print(f"  start          {entry['start_s']:.1f} s")
        print(
            f"  neighbour      {entry['neighbour_share']:+.0%} while another worker computes here"
        )
        for kind, errors in entry["residuals"]["kinds"].items():
            print(
                f"  error          {kind}: median {errors['median']:.1%}, "
                f"P90 {errors['p90']:.1%} of {errors['num_points']} points"
            )
    first = profile["workers"][0]
    print(
        f"\na request      {_ms(first['request_s'])} beside its steps, "
        f"{_ms(1000 * first['request_token_s'])} more for 1,000 tokens of prompt\n"
        f"a hand-off     {_ms(first['link_latency_s'])} and "
        f"{first['link_bytes_per_second'] / 1e9:.2f} GB/s"
    )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _hardware(fit: StepFit) -> Hardware:
    return Hardware(*fit.coefficients)


def _with_overheads(
    own: Hardware, found: Overheads, neighbour_share: float, seen: LiveSeen
) -> Hardware:
    own = with_telling(dataclasses.replace(own, step_gap_s=found.step_gap_s), found.told_sequence_s)
    return dataclasses.replace(
        own,
        request_s=found.request_s,
        request_token_s=found.request_token_s,
        link_latency_s=found.link_latency_s,
        link_bytes_per_second=seen.link_bytes_per_second or own.link_bytes_per_second,
        # Part of what a request waits outside of workers.
        message_s=0.0,
        neighbour_share=neighbour_share,
    )


def _residuals(pool: PoolMeasured) -> dict[str, Any]:
    return {
        "num_rounds": pool.num_rounds,
        "kinds": {
            kind.value: dataclasses.asdict(errors) for kind, errors in pool.fit.residuals.items()
        },
    }


def _machine(pool: PoolMeasured) -> str:
    if pool.is_on_gpu:
        import torch

        return f"{pool.tp_size} x {torch.cuda.get_device_name()}"
    return f"{len(os.sched_getaffinity(0))} cores of {_cpu_name()}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
