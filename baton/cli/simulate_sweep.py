"""`baton simulate --sweep`: the same cluster at one rate after another."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from baton.core.errors import ConfigError

if TYPE_CHECKING:
    from baton.cli.simulate import Setup
    from baton.simulator.run_report import RunReport

MAX_RATES = 100

Swept = Callable[[argparse.Namespace, "Setup", list[float]], "list[RunReport]"]


def run_sweep(args: argparse.Namespace, setup: Setup, sweep: Swept) -> int:
    """1 when the targets are missed at every rate."""
    from baton.cli.simulate_report import print_sweep, run_json
    from services.planner.plot import draw_sweep

    if args.seconds is not None:
        raise ConfigError("--sweep runs --requests N at each rate: leave --seconds out")
    rates = sweep_rates(args.sweep)
    reports = sweep(args, setup, rates)
    name = setup.candidate.name
    if args.json:
        runs = [
            {"rate_per_s": rate, **run_json(report, name, args.price)}
            for rate, report in zip(rates, reports, strict=True)
        ]
        print(json.dumps({"cluster": name, "runs": runs}, indent=1))
    else:
        print_sweep(rates, reports, name, setup.objective)
    if args.plot is not None:
        draw_sweep(args.plot, rates, reports, setup.objective)
    return 0 if any(report.attainment >= args.share for report in reports) else 1


def sweep_rates(text: str) -> list[float]:
    """Of `5,10,20`, or of `5:40:8`: eight rates from 5 to 40. Raises ConfigError."""
    try:
        if ":" in text:
            first, last, number = text.split(":")
            low, high, num = float(first), float(last), int(number)
            if not 2 <= num <= MAX_RATES or not low < high:
                raise ConfigError(
                    f"--sweep LOW:HIGH:N needs LOW below HIGH and 2 to {MAX_RATES} rates, "
                    f"got {text}"
                )
            rates = [low + (high - low) * i / (num - 1) for i in range(num)]
        else:
            rates = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--sweep takes 5,10,20 or 5:40:8, got {text!r}") from None
    if len(rates) > MAX_RATES:
        raise ConfigError(f"--sweep takes at most {MAX_RATES} rates, got {len(rates)}")
    for rate in rates:
        if not (math.isfinite(rate) and rate > 0):
            raise ConfigError(f"--sweep: a rate must be above 0 and finite, got {rate:g}")
    return sorted(set(rates))
