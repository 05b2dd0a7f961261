"""`python -m services.planner`: decides for a deployment and tells what it has decided.

It starts and stops nothing: whoever scales the pools (KEDA, an HPA, an operator's script) follows
`baton_planner_desired_workers`. `baton serve --autoscale` has a planner of its own, which acts.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

from baton.core.config import merge
from baton.core.errors import BatonError, ConfigError
from baton.core.logging import log_fields
from baton.process import (
    EXIT_CONFIG,
    EXIT_FAILED,
    add_parent_argument,
    add_settings_arguments,
    exit_with_parent,
)
from baton.settings import parse_override, start_logging
from services.planner.decision_log import DecisionLog
from services.planner.http_stats import HttpStats
from services.planner.loop import PlannerLoop
from services.planner.metrics_port import MetricsPort
from services.planner.planner import Planner
from services.planner.planner_config import PlannerConfig, load_models, load_planner_config
from services.planner.planner_gauges import PlannerGauges
from services.planner.reachable import out_of_reach

logger = logging.getLogger(__name__)

LATE_INTERVALS = 6
LATE_S = 60.0
"""Without the end of a step for longer than both, it is not alive."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run until it is told to stop; returns the exit status."""
    arguments = _parser().parse_args(argv)
    exit_with_parent(arguments.exit_with_parent)
    try:
        overrides = merge(*(parse_override(text) for text in arguments.overrides))
        config = load_planner_config(file=arguments.config, environ=os.environ, overrides=overrides)
        stopping = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopping.set())
        start_logging("planner", config.log)
        _run(config, stopping)
    except ConfigError as error:
        print(f"baton planner: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except BatonError as error:
        logger.error("%s", error)
        return EXIT_FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m services.planner",
        description="How many prefill and decode workers a deployment is to have, as Prometheus "
        "gauges and a decision log. Every setting of PlannerConfig can be given by --config, by "
        "BATON_<SECTION>__<FIELD> in the environment, or by --set.",
    )
    add_settings_arguments(parser, example="autoscale.ttft_s=0.5")
    add_parent_argument(parser)
    return parser


def _run(config: PlannerConfig, stopping: threading.Event) -> None:
    if config.autoscale.can_change_roles:
        raise ConfigError(
            "autoscale.can_change_roles: nobody who follows these numbers can change the role of a "
            "running worker; leave it out (`baton serve --autoscale --no-ray` can)"
        )
    gauges = PlannerGauges()
    models = load_models(config.models)
    for text in out_of_reach(config.autoscale, models):
        logger.warning("%s", text)
    stats = HttpStats(config.stats)
    planner = Planner(config.autoscale, models, DecisionLog(config.decisions), gauges)
    loop = PlannerLoop(planner, stats, None, gauges)
    started_s = time.time()
    late_s = max(LATE_S, LATE_INTERVALS * config.interval_s)

    def is_alive() -> bool:
        return time.time() - (loop.last_step_s or started_s) < late_s

    port = MetricsPort(gauges, host=config.host, port=config.port, is_alive=is_alive)
    try:
        port.start()
        log_fields(
            logger,
            "planner ready",
            port=port.port,
            prefill=models.prefill.source,
            decode=models.decode.source,
            pid=os.getpid(),
        )
        while not stopping.wait(_until_next(config.interval_s)):
            loop.step(time.time())
    finally:
        port.stop()
    log_fields(logger, "planner stopped")


def _until_next(interval_s: float) -> float:
    """Steps are at multiples of the interval, however long they take."""
    return interval_s - time.monotonic() % interval_s


if __name__ == "__main__":
    sys.exit(main())
