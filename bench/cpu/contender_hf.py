"""Hugging Face `generate`, eager, greedy. Usage: contender_hf MODEL_DIR DTYPE THREADS SEED"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM

from bench.cpu.workload import measure, report


def main(model_dir: str, dtype: str, threads: int, seed: int) -> None:
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def generate(batch: list[list[int]], output_len: int) -> None:
        ids = torch.tensor(batch)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=output_len,
            min_new_tokens=output_len,
            do_sample=False,
            pad_token_id=0,
        )
        assert out.shape[1] == ids.shape[1] + output_len

    report(measure(generate, seed=seed))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
