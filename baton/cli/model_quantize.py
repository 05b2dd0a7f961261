"""`baton model quantize`: options, progress, and what is printed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from baton.core.errors import ConfigError
from baton.core.quantization import DEFAULT_GROUP_SIZE, GROUP_SIZES, QuantizationConfig, Scheme
from baton.model_import.progress import Unit

if TYPE_CHECKING:
    from baton.cli.progress import TerminalProgress

NO_SCHEME = "none"


def add_quantize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="IN", help="a Hugging Face model folder")
    parser.add_argument("target", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument(
        "--scheme",
        choices=(*(scheme.value for scheme in Scheme), NO_SCHEME),
        required=True,
        help="of the weights: fp8 rounds activations too, the others do not; none with "
        "--kv-cache alone",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        metavar="N",
        help=f"input channels that share a scale, of int4 ({DEFAULT_GROUP_SIZE}); one of "
        f"{', '.join(map(str, GROUP_SIZES))}",
    )
    parser.add_argument(
        "--quantize-head", action="store_true", help="an lm_head of its own as well"
    )
    parser.add_argument(
        "--kv-cache", choices=("fp8",), help="measure scales for a KV cache of this type"
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="UTF-8 text that int4 and KV scales are measured on (default: a short mixed one)",
    )
    parser.add_argument(
        "--no-calibration",
        action="store_true",
        help="int4 without a text: faster, and clearly worse",
    )


def run_quantize(args: argparse.Namespace) -> int:
    from rich.console import Console

    from baton.cli.progress import TerminalProgress
    from baton.engine.quantization.calibration_text import CALIBRATION_TEXT
    from baton.engine.quantization.folder import quantize_folder

    config = _config(args)
    text: str | None = None if args.no_calibration else CALIBRATION_TEXT
    if args.calibration is not None:
        if args.no_calibration:
            raise ConfigError("--calibration and --no-calibration contradict each other; take one")
        if config.scheme is not Scheme.INT4 and not config.has_kv_scales:
            raise ConfigError(
                f"{config.name} measures nothing on a text; leave --calibration out or add "
                "--kv-cache fp8"
            )
        try:
            text = args.calibration.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{args.calibration} is no readable UTF-8 text: {error}") from error
    with TerminalProgress(Console(stderr=True)) as shown:
        result = quantize_folder(
            args.source,
            args.target,
            config,
            calibration_text=text,
            progress=_Stages(shown),
        )
    share = result.target_bytes / result.source_bytes
    print(
        f"quantised to {args.target}: {config.name}, {result.source_bytes / 1e6:,.1f} MB -> "
        f"{result.target_bytes / 1e6:,.1f} MB ({share:.0%})"
    )
    return 0


def _config(args: argparse.Namespace) -> QuantizationConfig:
    scheme = None if args.scheme == NO_SCHEME else Scheme(args.scheme)
    group_size = args.group_size
    if scheme is Scheme.INT4 and group_size is None:
        group_size = DEFAULT_GROUP_SIZE
    return QuantizationConfig(
        scheme,
        group_size,
        quantizes_head=args.quantize_head,
        has_kv_scales=args.kv_cache is not None,
    )


class _Stages:
    """The engine's QuantizeProgress on a terminal."""

    def __init__(self, shown: TerminalProgress) -> None:
        self._shown = shown

    def start_stage(self, description: str, total: int | None, *, counts_bytes: bool) -> None:
        self._shown.start_stage(description, total, Unit.BYTES if counts_bytes else Unit.TENSORS)

    def update(self, completed: int) -> None:
        self._shown.update(completed)
