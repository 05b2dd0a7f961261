"""How well a simulation says what a live system does: the same requests at the same times in both.

    python -m bench.simulator_accuracy [--profile FILE] [--requests N] [--rounds N] [--again]

Profiles the engine here (or reads --profile), starts the processes of `baton serve` with the real
engine, sends three workloads, and simulates exactly those arrivals with the profile's figures.
Rates come from the profile too, so that the busier pool works `--load` of its time. Nothing is
fitted to what the workloads give. With --again a second profile is measured afterwards, and the
same arrivals are simulated with it: the difference is what the machine has changed by meanwhile.

    chat       short prompts, some tokens, Poisson
    long       long prompts, few tokens, Poisson
    sessions   turns that repeat all that was said before, behind one system prompt, in clumps

Compared are TTFT and a request's mean time between tokens, P50 and P90, and tokens a second. The
first requests of each workload count in neither.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from baton.cli.profile_client import Streamed, completion_body, stream_completion
from baton.cli.profile_pools import measure_pools
from baton.cli.profile_report import profile_of
from baton.cli.profile_system import Question, free_ports, measure_system, running
from baton.core.block import chain_hashes, root_hash
from baton.core.config import build
from baton.core.worker_info import Role
from baton.engine.model_config import load_model_config
from baton.model_import.progress import SilentProgress
from baton.simulator.cluster import SimCluster
from baton.simulator.cluster_config import ClusterConfig
from baton.simulator.outcome import Outcome
from baton.simulator.workload import Arrival
from bench.accuracy_figures import GOAL, Got, compare, print_summary, summarize
from bench.accuracy_workloads import Asked, Workloads
from bench.machine import describe, store
from services.launch.config import SystemConfig
from services.launch.pools import engine_config
from services.launch.run_directory import RunDirectory
from services.planner.profile_file import Profile, read_profile
from services.router.admission.admission_config import AdmissionConfig

DEFAULT_MODEL = Path.home() / ".cache/baton/models/float32/SmolLM2-135M-Instruct"
PAUSE_S = 1.0
READY_TIMEOUT_S = 300.0


def main() -> None:
    args = _parser().parse_args()
    system = _system(args)
    profile, profile_json = _profile(args, system)
    print(f"profile: {profile.source}")
    workloads = Workloads(
        profile, system, load=args.load, num_requests=args.requests, seed=args.seed
    )
    makers: dict[str, Callable[[], list[Asked]]] = {
        "chat": workloads.chat,
        "long": workloads.long,
        "sessions": workloads.sessions,
    }
    rows: list[dict[str, Any]] = []
    plan = [(name, makers[name]()) for _ in range(args.rounds) for name in args.workloads]
    live, starts_s = run_live(system, [asked for _, asked in plan])
    profiles = {"before": (profile, profile_json)}
    if args.again:
        profiles["after"] = _measured(args, system)
    for when, (figures, _) in profiles.items():
        simulated = simulate(system, figures, [asked for _, asked in plan], starts_s)
        for (name, asked), got, expected in zip(plan, live, simulated, strict=True):
            rows.append({"workload": name, "profile": when, **compare(asked, got, expected)})
    summary = summarize(rows)
    print_summary(summary)
    result = {
        "machine": describe(),
        "model": str(system.model_path.name),
        "dtype": args.dtype,
        "threads": args.threads,
        "workers": [system.num_prefill, system.num_decode],
        "load": args.load,
        "requests": args.requests,
        "goal": GOAL,
        "profiles": {when: data for when, (_, data) in profiles.items()},
        "summary": summary,
        "rows": rows,
    }
    print(f"wrote {store('simulator-accuracy', result, args.out)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1, help="of each worker's engine")
    parser.add_argument("--prefill", type=int, default=1, metavar="N")
    parser.add_argument("--decode", type=int, default=1, metavar="N")
    parser.add_argument("--profile", type=Path, help="instead of measuring one now")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each pool's profile")
    parser.add_argument("--requests", type=int, default=60, help="of each workload")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--load", type=float, default=0.5, help="share of time, of the busier pool")
    parser.add_argument("--workloads", nargs="+", default=["chat", "long", "sessions"])
    parser.add_argument("--again", action="store_true", help="measure a second profile afterwards")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    return parser


def _system(args: argparse.Namespace) -> SystemConfig:
    """Fixed threads: steps then cost what the profile says, whoever else computes."""
    http_port, grpc_port = free_ports(2)
    pool = {"engine": {"dtype": args.dtype, "num_threads": args.threads}}
    values = {
        "model_path": args.model,
        "http_port": http_port,
        "grpc_port": grpc_port,
        "num_prefill": args.prefill,
        "num_decode": args.decode,
        "prefill": pool,
        "decode": pool,
    }
    return build(SystemConfig, values)


def _profile(args: argparse.Namespace, system: SystemConfig) -> tuple[Profile, Any]:
    if args.profile is not None:
        return read_profile(args.profile), json.loads(args.profile.read_text())
    return _measured(args, system)


def _measured(args: argparse.Namespace, system: SystemConfig) -> tuple[Profile, Any]:
    """As `baton profile` does it."""
    print("measuring a profile", flush=True)
    pools = measure_pools(system, args.seconds, seed=args.seed, progress=SilentProgress())
    step_tokens = pools["prefill"].limits.max_num_batched_tokens
    question = Question(
        (step_tokens // 8, step_tokens // 2, step_tokens),
        step_tokens // 8,
        pools["prefill"].vocab_size,
        num_rounds=3,
        ready_timeout_s=READY_TIMEOUT_S,
        seed=args.seed,
    )
    seen = measure_system(system, question, on_round=lambda _: None)
    data = profile_of(system, pools, seen)
    file = args.out / "simulator-accuracy-profile.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data, indent=1) + "\n")
    try:
        return read_profile(file), data
    finally:
        file.unlink()


def run_live(
    system: SystemConfig, workloads: Sequence[Sequence[Asked]]
) -> tuple[list[list[Got]], list[float]]:
    """What each request got, and when each workload began, counted from the first."""
    directory = RunDirectory.create()
    with running(system, directory, READY_TIMEOUT_S) as (address, _):
        results, starts_s = asyncio.run(_send_all(address, system.served_model_name, workloads))
    directory.remove()
    return results, starts_s


async def _send_all(
    address: str, model: str, workloads: Sequence[Sequence[Asked]]
) -> tuple[list[list[Got]], list[float]]:
    results: list[list[Got]] = []
    starts_s: list[float] = []
    zero_s: float | None = None
    for number, asked in enumerate(workloads):
        bodies = [completion_body(model, a.prompt, a.num_output_tokens) for a in asked]
        start_s = time.perf_counter() + 0.2
        zero_s = start_s if zero_s is None else zero_s
        starts_s.append(start_s - zero_s)
        streams = await asyncio.gather(
            *(
                _send_at(start_s + a.at_s, address, body)
                for a, body in zip(asked, bodies, strict=True)
            )
        )
        results.append([_got(a, s, start_s) for a, s in zip(asked, streams, strict=True)])
        print(f"live: {number + 1} of {len(workloads)} workloads", file=sys.stderr, flush=True)
        await asyncio.sleep(PAUSE_S)
    return results, starts_s


async def _send_at(at_s: float, address: str, body: bytes) -> Streamed:
    await asyncio.sleep(max(0.0, at_s - time.perf_counter()))
    return await stream_completion(address, body)


def _got(asked: Asked, streamed: Streamed, start_s: float) -> Got:
    return Got(
        streamed.ttft_s,
        streamed.mean_itl_s(asked.num_output_tokens),
        streamed.sent_s - start_s,
        streamed.last_s - start_s,
        asked.num_output_tokens,
    )


def simulate(
    system: SystemConfig,
    profile: Profile,
    workloads: Sequence[Sequence[Asked]],
    starts_s: Sequence[float],
) -> list[list[Got]]:
    """One simulation over all of them, as one router and its workers have seen them."""
    config = cluster_of(system, profile)
    root = root_hash("accuracy")
    arrivals: list[Arrival] = []
    for start_s, asked in zip(starts_s, workloads, strict=True):
        for a in asked:
            chain = tuple(chain_hashes(root, a.prompt, config.block_size))
            number = len(arrivals)
            at_s = start_s + a.at_s
            arrivals.append(Arrival(number, at_s, len(a.prompt), a.num_output_tokens, chain))
    outcomes = SimCluster(config).run(arrivals)
    results: list[list[Got]] = []
    first = 0
    for start_s, asked in zip(starts_s, workloads, strict=True):
        own = outcomes[first : first + len(asked)]
        results.append([_simulated(outcome, start_s) for outcome in own])
        first += len(asked)
    return results


def _simulated(outcome: Outcome, start_s: float) -> Got:
    return Got(
        outcome.ttft_s,
        outcome.itl_s,
        outcome.arrived_s - start_s,
        outcome.last_token_s - start_s,
        outcome.num_output_tokens,
    )


def cluster_of(system: SystemConfig, profile: Profile) -> ClusterConfig:
    """All workers on this host; engines with the settings of the live ones."""
    prefill_engine, decode_engine = (engine_config(system, r) for r in (Role.PREFILL, Role.DECODE))
    prefill, decode = profile.prefill[1], profile.decode[1]
    block_size = prefill_engine.block_size
    return ClusterConfig(
        num_prefill=system.num_prefill,
        num_decode=system.num_decode,
        num_blocks=prefill.max_kv_tokens // block_size,
        num_decode_blocks=decode.max_kv_tokens // block_size,
        block_size=block_size,
        num_layers=1,
        num_kv_heads=1,
        head_dim=profile.kv_bytes_per_token // 4,
        max_model_len=load_model_config(system.model_path).max_position_embeddings,
        prefill_max_num_seqs=prefill_engine.max_num_seqs,
        prefill_max_num_batched_tokens=prefill_engine.max_num_batched_tokens,
        decode_max_num_seqs=decode_engine.max_num_seqs,
        decode_max_num_batched_tokens=decode_engine.max_num_batched_tokens,
        hardware=prefill.hardware,
        decode_hardware=decode.hardware,
        workers_per_host=system.num_prefill + system.num_decode,
        admission=AdmissionConfig(),
    )


if __name__ == "__main__":
    main()
