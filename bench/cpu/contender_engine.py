"""Our engine in one process (colocated, no network). Usage: MODEL_DIR DTYPE THREADS SEED"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from baton.core.clock import WallClock
from baton.core.request import GenerateRequest, RequestId, SamplingParams, Work
from baton.engine.config import EngineConfig
from baton.engine.factory import build_engine
from bench.cpu.workload import measure, report


def main(model_dir: str, dtype: str, threads: int, seed: int) -> None:
    config = EngineConfig(
        model_path=Path(model_dir),
        dtype=dtype,
        num_threads=threads,
        max_num_seqs=8,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
    )
    engine = build_engine(config, clock=WallClock()).engine

    def generate(batch: list[list[int]], output_len: int) -> None:
        sampling = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
        for i, ids in enumerate(batch):
            request_id = RequestId(f"{time.monotonic_ns()}-{i}")
            engine.submit(GenerateRequest(request_id, Work.GENERATE, tuple(ids), sampling))
        num_tokens = 0
        while engine.has_work:
            num_tokens += sum(len(d.token_ids) for d in engine.step().deltas)
        assert num_tokens == len(batch) * output_len

    report(measure(generate, seed=seed))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
