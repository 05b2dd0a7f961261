"""`baton doctor --settings DIR`: what settings ask of this machine, before anything starts.

    router*.yaml, prefill*.yaml, decode*.yaml      as the chart mounts them at /etc/baton, or as
                                                   `baton serve --run-dir` writes them

Secrets and addresses come from the environment, as they do for the processes. No worker is asked;
one key is written to Redis and one file to the disk tier, and both are gone afterwards.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from baton.cli.doctor_devices import (
    check_memory,
    check_visible_gpus,
    memory_limit_bytes,
)
from baton.cli.doctor_machine import check_machine
from baton.cli.doctor_store import check_store
from baton.cli.doctor_types import Check, Severity
from baton.cli.doctor_versions import check_versions
from baton.core.block import HASH_SCHEME
from baton.core.errors import ConfigError
from baton.core.tls import load_material
from baton.engine.config import Device, LoadFormat
from baton.engine.model_config import load_model_config
from baton.engine.tensor_parallel.limits import check_tp_size
from baton.rpc.channel import is_loopback
from kvtransfer.tiers.config import TierConfig
from services.decode.config import DEFAULTS as DECODE_DEFAULTS
from services.launch.compatibility import check_pools_match
from services.launch.pools import gpu_demand, visible_gpus
from services.launch.readiness import check_model_folder, listen_error
from services.planner.planner_config import load_models, load_planner_config
from services.prefill.config import DEFAULTS as PREFILL_DEFAULTS
from services.router.config import RouterConfig, load_router_config
from services.router.edge.door_tls import load_door_material
from services.router.requests.tracer import open_exporter
from services.router.telemetry_config import TracingConfig
from services.router.tenants.api_keys import read_keys
from services.worker.config import WorkerConfig, load_worker_config

ERROR = Severity.ERROR
_POOLS = {"prefill": PREFILL_DEFAULTS, "decode": DECODE_DEFAULTS}


@dataclass(slots=True)
class Settings:
    """What the files of a folder say, by file name without its end."""

    routers: dict[str, RouterConfig] = field(default_factory=dict)
    workers: dict[str, WorkerConfig] = field(default_factory=dict)
    refused: list[Check] = field(default_factory=list)

    def urls(self) -> list[str]:
        """Of every Redis."""
        found = [c.shared.url for c in self.routers.values()]
        found += [c.registry.url for c in self.workers.values()]
        return list(dict.fromkeys(url for url in found if url is not None))


def check_before(folder: Path, environ: Mapping[str, str]) -> list[Check]:
    """Raises ConfigError when there is nothing to look at."""
    settings = read_settings(folder, environ)
    tiers = next((c.tiers for c in settings.workers.values()), TierConfig())
    checks = [*check_versions(), *settings.refused]
    names = [*settings.routers, *settings.workers]
    if names:
        checks.append(Check("settings", f"of {', '.join(names)} are in order"))
    checks += _of_pools(settings)
    checks += _of_models(settings)
    checks += _of_secrets(settings)
    checks += _of_certificates(settings)
    checks += _of_tracing(settings)
    checks += _of_ports(settings)
    checks += _of_planner(folder, environ)
    for url in settings.urls():
        checks += check_store(url)
    checks += _of_devices(settings, environ)
    num_ranks = max((c.engine.tp_size for c in settings.workers.values()), default=1)
    checks += check_machine(environ, {}, tiers, num_ranks=num_ranks)
    return checks


def read_settings(folder: Path, environ: Mapping[str, str]) -> Settings:
    """Raises ConfigError when `folder` holds no settings."""
    files = [f for kind in ("router", *_POOLS) for f in sorted(folder.glob(f"{kind}*.yaml"))]
    if not files:
        raise ConfigError(
            f"{folder} holds no router.yaml, prefill.yaml or decode.yaml; give the folder of the "
            "settings files"
        )
    found = Settings()
    # Workers that listen everywhere get their address from the pod, which is not there yet.
    here = {"BATON_ADVERTISE_HOST": "127.0.0.1", **environ}
    for file in files:
        pool = next((pool for pool in _POOLS if file.name.startswith(pool)), None)
        try:
            if pool is None:
                found.routers[file.stem] = load_router_config(file=file, environ=environ)
            else:
                found.workers[file.stem] = load_worker_config(
                    defaults=_POOLS[pool], file=file, environ=here
                )
        except ConfigError as error:
            fix = f"correct it in {file}, or in the values it is made of"
            found.refused.append(Check(f"settings of {file.stem}", str(error), ERROR, fix))
    return found


def _of_planner(folder: Path, environ: Mapping[str, str]) -> Iterator[Check]:
    """Settings and figures of workers, where pools are planned for."""
    file = folder / "planner.yaml"
    if not file.is_file():
        return
    try:
        config = load_planner_config(file=file, environ=environ)
        models = load_models(config.models)
    except ConfigError as error:
        yield Check("planner", str(error), ERROR, f"correct it in {file}, or where it comes from")
        return
    targets = config.autoscale
    yield Check(
        "planner",
        f"keeps TTFT {targets.ttft_s:g} s and ITL {targets.itl_s:g} s on {targets.max_devices} "
        f"devices, by figures of {models.prefill.source}",
    )


def _attempt(name: str, check: Callable[[], object], found: str) -> Check:
    """`found`, or the reason of the ConfigError that `check` raises."""
    try:
        check()
    except ConfigError as error:
        return Check(name, str(error), ERROR)
    return Check(name, found)


def _of_pools(settings: Settings) -> Iterator[Check]:
    """Block size, layout and hashes: what workers of both pools must have alike."""
    by_pool = {
        pool: next((c for name, c in settings.workers.items() if name.startswith(pool)), None)
        for pool in _POOLS
    }
    prefill, decode = by_pool["prefill"], by_pool["decode"]
    if prefill is None or decode is None:
        return
    found = f"blocks of {decode.engine.block_size} tokens in both pools, named by {HASH_SCHEME}"
    yield _attempt("pools", lambda: check_pools_match(prefill.engine, decode.engine), found)


def _of_models(settings: Settings) -> Iterator[Check]:
    of_routers = (c.model_path for c in settings.routers.values())
    of_workers = (c.engine.model_path for c in settings.workers.values())
    for folder in dict.fromkeys([*of_routers, *of_workers]):
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        # Routers read the tokenizer alone.
        has_weights = any(
            engine.model_path == folder and engine.load_format is not LoadFormat.DUMMY
            for engine in (c.engine for c in settings.workers.values())
        )
        check = functools.partial(check_model_folder, folder, has_weights=has_weights)
        yield _attempt("model files", check, f"{folder}: {size / 1e9:.1f} GB of weights")
    for name, config in settings.workers.items():
        check = functools.partial(_check_model, config)
        yield _attempt("model", check, f"fits the engine of {name}")


def _check_model(config: WorkerConfig) -> None:
    if not config.engine.model_path.is_dir():
        return
    model = load_model_config(config.engine.model_path)
    check_tp_size(model, config.engine.tp_size)
    wanted, limit = config.engine.max_model_len, model.max_position_embeddings
    if wanted is not None and not 1 <= wanted <= limit:
        raise ConfigError(
            f"engine.max_model_len {wanted} is outside 1..{limit}, the model's own limit"
        )


def _of_secrets(settings: Settings) -> Iterator[Check]:
    for name, worker in settings.workers.items():
        is_wide = worker.registry.url is not None or not is_loopback(worker.host)
        if is_wide and worker.transfer.cluster_secret is None:
            yield Check(
                "secrets",
                f"{name}: transfer.cluster_secret is not set, and peers of other machines need it",
                ERROR,
                "set BATON_TRANSFER__CLUSTER_SECRET to the same at least 16 characters on all "
                "workers, for example of `openssl rand -hex 32`",
            )
    for name, router in settings.routers.items():
        path = router.tenants.keys_file
        if path is None:
            continue
        if not path.is_file():
            fix = "make it with `baton keys create TENANT --file FILE`, or mount the secret"
            yield Check("secrets", f"{name}: tenants.keys_file {path} does not exist", ERROR, fix)
            continue
        check = functools.partial(read_keys, path)
        yield _attempt("secrets", check, f"{name}: the API keys can be read")


def _of_certificates(settings: Settings) -> Iterator[Check]:
    everybody = {name: c.tls for name, c in settings.routers.items()}
    everybody |= {name: c.tls for name, c in settings.workers.items()}
    for name, config in everybody.items():
        if config.is_on:
            check = functools.partial(load_material, config)
            yield _attempt("certificates", check, f"of {name} work")
    for name, router in settings.routers.items():
        if router.edge.tls.is_on:
            doors = functools.partial(load_door_material, router.edge.tls)
            yield _attempt("certificates", doors, f"of the front doors of {name} work")
    has_tls = {config.is_on for config in everybody.values()}
    if len(has_tls) > 1:
        yield Check(
            "certificates",
            "some processes have tls.ca_file, cert_file and key_file, and others none",
            ERROR,
            "give all of them TLS, or none: they could not talk to each other",
        )


def _of_tracing(settings: Settings) -> Iterator[Check]:
    for name, router in settings.routers.items():
        if router.tracing.otlp_endpoint is not None:
            check = functools.partial(_try_exporter, router.tracing)
            yield _attempt("tracing", check, f"{name}: what sends spans is installed")


def _try_exporter(config: TracingConfig) -> None:
    exporter = open_exporter(config)
    if exporter is not None:
        exporter.close()


def _of_ports(settings: Settings) -> Iterator[Check]:
    taken: list[str] = []
    num_free = 0
    for name, router in settings.routers.items():
        ports = {
            "http_port": router.http_port,
            "grpc_port": router.grpc_port,
            "copy.own_port": router.copy.own_port or 0,
        }
        given = [port for port in ports.values() if port]
        if len(set(given)) < len(given):
            same = ", ".join(f"{key} {port}" for key, port in ports.items())
            yield Check("ports", f"{name}: {same}", ERROR, "give each door a port of its own")
        for key, port in ports.items():
            problem = _port_problem(router.host, port)
            num_free += bool(port and not problem)
            taken += [f"{name}: {key} {problem}"] if problem else []
    for name, worker in settings.workers.items():
        problem = _port_problem(worker.host, worker.port)
        num_free += bool(worker.port and not problem)
        taken += [f"{name}: port {problem}"] if problem else []
    for text in taken:
        yield Check("ports", text, ERROR, "choose another, or end what listens there")
    if not taken:
        yield Check("ports", f"{num_free} are free, all others are found at the start")


def _port_problem(host: str, port: int) -> str:
    if not port:
        return ""
    error = listen_error(host, port)
    return "" if error is None else f"{port} on {host}: {os.strerror(error.errno or 0)}"


def _of_devices(settings: Settings, environ: Mapping[str, str]) -> Iterator[Check]:
    demands = [(name, gpu_demand(c.engine)) for name, c in settings.workers.items()]
    held = [
        (f"engine.kv_cache_bytes of {name}", c.engine.kv_cache_bytes or 0)
        for name, c in settings.workers.items()
        if c.engine.device is Device.CPU
    ]
    held += [
        (f"tiers.host_bytes of {name}", c.tiers.host_bytes) for name, c in settings.workers.items()
    ]
    yield check_visible_gpus(visible_gpus(environ), demands)
    yield check_memory(memory_limit_bytes(), held)
