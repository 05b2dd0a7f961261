"""Draws where each kernel stands under the roofline of the card it ran on.

    python -m bench.gpu.roofline [RESULT.json [OUT.png]]

Without a result the newest of bench.kernels is drawn.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench import machine
from bench.gpu.cases import OURS


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a PNG: FLOP/s over FLOP per byte, one mark per case, one colour per group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bandwidth = result["ceilings"]["copy_bytes_per_s"]
    peak = result["ceilings"]["bf16_flops_per_s"]
    figure, axes = pyplot.subplots(figsize=(10, 6.5), dpi=130)
    intensities = [10 ** (e / 20) for e in range(-20, 85)]
    for name, flops_per_s, line in (
        ("bf16", peak, "k-"),
        ("fp8", result["ceilings"]["measured_fp8_flops_per_s"], "k:"),
    ):
        if flops_per_s is None:
            continue
        roof = [min(flops_per_s, bandwidth * i) / 1e12 for i in intensities]
        axes.loglog(intensities, roof, line, linewidth=1.2, label=f"limit, {name}")
    drawn = [c for c in result["cases"] if c["flops"] > 0 and OURS in c["contenders"]]
    colours = pyplot.get_cmap("tab10")
    for index, group in enumerate(sorted({case["group"] for case in drawn})):
        cases = [c for c in drawn if c["group"] == group]
        axes.plot(
            [c["flops"] / c["bytes"] for c in cases],
            [c["contenders"][OURS]["tflop_per_s"] for c in cases],
            "o",
            color=colours(index % 10),
            markersize=5,
            alpha=0.8,
            label=group,
        )
    axes.set_xlabel("FLOP per byte that must move")
    axes.set_ylabel("TFLOP/s")
    device, commit = result["machine"].get("gpu", "GPU"), result["machine"]["commit"]
    axes.set_title(
        f"{device}, commit {commit}: copy {bandwidth / 1e9:.0f} GB/s, "
        f"bf16 matmul {peak / 1e12:.0f} TFLOP/s"
    )
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def newest_result(folder: Path) -> Path | None:
    """Of bench.kernels, by the time it was written."""
    found = sorted(folder.glob("kernels-*.json"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def main() -> int:
    if len(sys.argv) > 3:
        print(__doc__, file=sys.stderr)
        return 2
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else newest_result(machine.RESULTS)
    if source is None:
        print(f"no kernels-*.json in {machine.RESULTS.name}; run bench.kernels", file=sys.stderr)
        return 1
    target = Path(sys.argv[2]) if len(sys.argv) == 3 else source.with_suffix(".png")
    draw(json.loads(source.read_text()), target)
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
