"""Workloads that `bench.simulator_accuracy` sends: made anew each time, at rates a profile allows.

Does not know: who answers them.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from baton.cli.profile_pools import usable_vocabulary
from baton.core.worker_info import Role
from services.launch.config import SystemConfig
from services.launch.pools import engine_config
from services.planner.profile_file import Profile
from services.planner.profiling.overheads import decode_s, prompt_s

SYSTEM_TOKENS = 192
"""That all sessions begin with."""
MAX_SESSION_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of a workload; time since its start."""

    at_s: float
    prompt: tuple[int, ...]
    num_output_tokens: int


class Workloads:
    """Of fresh random tokens each time, at rates that the profile allows."""

    def __init__(
        self, profile: Profile, system: SystemConfig, *, load: float, num_requests: int, seed: int
    ) -> None:
        self._rng = random.Random(seed)
        self._vocab_size = usable_vocabulary(system.model_path)
        self._prefill = next(iter(profile.prefill.values())).hardware
        self._decode = next(iter(profile.decode.values())).hardware
        self._step_tokens = engine_config(system, Role.PREFILL).max_num_batched_tokens
        self._max_num_seqs = engine_config(system, Role.DECODE).max_num_seqs
        self._num_prefill, self._num_decode = system.num_prefill, system.num_decode
        self._load, self._num = load, num_requests

    def chat(self) -> list[Asked]:
        lengths = [self._lengths((32, 200), (16, 64)) for _ in range(self._num)]
        return self._timed([self._tokens(i) for i, _ in lengths], [o for _, o in lengths], 1.0)

    def long(self) -> list[Asked]:
        num = max(10, self._num // 3)
        lengths = [self._lengths((512, 1536), (4, 12)) for _ in range(num)]
        return self._timed([self._tokens(i) for i, _ in lengths], [o for _, o in lengths], 1.0)

    def sessions(self) -> list[Asked]:
        common = self._tokens(SYSTEM_TOKENS)
        said = [common for _ in range(max(3, self._num // 8))]
        prompts: list[tuple[int, ...]] = []
        outputs: list[int] = []
        for _ in range(self._num):
            speaker = self._rng.randrange(len(said))
            question, output = self._lengths((16, 96), (12, 40))
            prompts.append(said[speaker] + self._tokens(question))
            outputs.append(output)
            # Long conversations end, so that all fit into the model's context.
            said[speaker] = (
                common if len(prompts[-1]) > 1024 else prompts[-1] + self._tokens(output)
            )
        return self._timed(prompts, outputs, 4.0)

    def _lengths(self, prompt: tuple[int, int], output: tuple[int, int]) -> tuple[int, int]:
        return self._rng.randint(*prompt), self._rng.randint(*output)

    def _tokens(self, num: int) -> tuple[int, ...]:
        return tuple(self._rng.randrange(self._vocab_size) for _ in range(num))

    def _timed(
        self, prompts: Sequence[tuple[int, ...]], outputs: Sequence[int], burstiness: float
    ) -> list[Asked]:
        rate_per_s = self._rate(prompts, outputs)
        at_s, asked = 0.0, []
        for prompt, output in zip(prompts, outputs, strict=True):
            at_s += self._rng.gammavariate(1 / burstiness, burstiness / rate_per_s)
            asked.append(Asked(at_s, prompt, output))
        return asked

    def _rate(self, prompts: Sequence[tuple[int, ...]], outputs: Sequence[int]) -> float:
        """At which the busier pool works `load` of its time, were there no cached prefix."""
        slow = 1 + self._prefill.neighbour_share
        prefill_s = statistics.mean(
            prompt_s(self._prefill, len(p), self._step_tokens) for p in prompts
        )
        context = statistics.mean(map(len, prompts))
        batch = min(4, self._max_num_seqs)
        step_s = decode_s(self._decode, batch, context) * (1 + self._decode.neighbour_share)
        sequence_s = statistics.mean(outputs) * step_s / batch
        return self._load / max(slow * prefill_s / self._num_prefill, sequence_s / self._num_decode)
