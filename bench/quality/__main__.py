"""Perplexity, KL divergence and greedy agreement of every scheme, against the bfloat16 weights.

    python -m bench.quality [--model DIR] [--only NAME]...

All rows but one compute in float32, so that they differ in what is stored and in nothing else; the
row "bf16 arithmetic" shows how far rounding activations to bfloat16 alone moves the same figures.
Folders are quantised as `baton model quantize` does it and loaded as the engine loads them; FP8
activations are rounded here as a GPU rounds them. The rows with "gains apart" quantise weights
without the norms' gains in them, which the engine cannot run; they show what folding costs.
The JSON under bench/results/ holds all figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from baton.cli.model import import_default
from baton.core.errors import ConfigError
from baton.core.quantization import QuantizationConfig
from baton.engine.config import EngineConfig
from baton.engine.layers.linear import Linear
from baton.engine.quantization.calibration_text import CALIBRATION_TEXT
from baton.engine.quantization.folder import quantize_folder
from baton.engine.quantization.rounding import quantize
from baton.engine.tokenizer import Tokenizer
from baton.engine.weights import LoadedModel, load_model
from bench import machine
from bench.quality.greedy import agreement, generate
from bench.quality.linears import RoundedActivationLinears
from bench.quality.logits import Text
from bench.quality.variants import BASELINE, Variant, chosen_variants

HERE = Path(__file__).resolve().parent
TEXT = HERE.parent / "data" / "quality.txt"
GOLDEN = HERE.parents[1] / "tests/parity/golden/smollm2_135m_instruct_greedy.json"
PROJECTIONS = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down"))


class _Silent:
    def start_stage(self, description: str, total: int | None, *, counts_bytes: bool) -> None:
        pass

    def update(self, completed: int) -> None:
        pass


def load_variant(variant: Variant, source: Path, scratch: Path) -> tuple[LoadedModel[Linear], int]:
    """The model, and the bytes of its weight files."""
    folder = source
    if variant.config is not None:
        folder = scratch / "model"
        shutil.rmtree(folder, ignore_errors=True)
        if variant.is_folded:
            text = CALIBRATION_TEXT if variant.is_calibrated else None
            quantize_folder(
                source, folder, variant.config, calibration_text=text, progress=_Silent()
            )
        else:
            _write_unfolded(source, folder, variant.config)
    config = EngineConfig(
        model_path=folder, dtype=variant.dtype, kv_cache_dtype=variant.kv_cache_dtype
    )
    dtype: torch.dtype = getattr(torch, variant.dtype)
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return load_model(config, linears=RoundedActivationLinears(dtype)), num_bytes


def _write_unfolded(source: Path, folder: Path, config: QuantizationConfig) -> None:
    """Weights rounded and turned back, in float32, with the gains where they were."""
    folder.mkdir()
    shutil.copyfile(source / "config.json", folder / "config.json")
    tensors = {}
    for path in source.glob("*.safetensors"):
        tensors.update(load_file(path))
    for name in [name for name in tensors if name.endswith(PROJECTIONS)]:
        tensors[name] = quantize(tensors[name], config).dequantized(torch.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("--model", type=Path, help="default: the imported default model")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="a row; may be repeated"
    )
    args = parser.parse_args()
    try:
        variants = chosen_variants(args.only)
    except ConfigError as error:
        parser.error(str(error))
    source = args.model or import_default(os.environ, dtype="bfloat16")
    token_ids = Tokenizer.from_folder(source).encode(
        TEXT.read_text(encoding="utf-8"), add_special_tokens=True
    )
    golden = json.loads(GOLDEN.read_bytes())
    prompts = {item["name"]: item["prompt_token_ids"] for item in golden["items"]}
    eos = (int(golden["eos_token_id"]),)
    with tempfile.TemporaryDirectory() as scratch:
        base, _ = load_variant(Variant(BASELINE), source, Path(scratch))
        reference = Text(token_ids, base)
        expected = generate(base, prompts, eos)
        rows = []
        for variant in variants:
            started_s = time.monotonic()
            model, num_bytes = load_variant(variant, source, Path(scratch))
            text = reference.score(model)
            greedy = agreement(generate(model, prompts, eos), expected)
            rows.append(
                {"name": variant.name, "weight_bytes": num_bytes}
                | dataclasses.asdict(text)
                | dataclasses.asdict(greedy)
            )
            print(_line(rows[-1]), f"({time.monotonic() - started_s:.0f} s)", flush=True)
    result = {
        "machine": machine.describe(),
        "model": source.name,
        "num_text_tokens": len(token_ids),
        "num_prompts": len(prompts),
        "num_reference_tokens": sum(map(len, expected.values())),
        "rows": rows,
    }
    if not args.only:
        print(f"stored {machine.store('quality', result)}")


def _line(row: dict[str, object]) -> str:
    values = [row[name] for name in ("perplexity", "mean_kl", "top1_agreement")]
    values += [row[name] for name in ("equal_tokens", "matched_prefix", "identical_outputs")]
    return f"{row['name']!s:28}" + "".join(f"{value:10.4f}" for value in values)


if __name__ == "__main__":
    main()
