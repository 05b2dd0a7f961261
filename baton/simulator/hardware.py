"""How long one worker would take: the made-up seconds of a simulation.

    step  fixed + token * computed + pair * (computed tokens x tokens before each)
          + sequence * decoding + kv_token * KV that decoding sequences read

Beside the steps: what a request waits for the router, what moving its KV takes, and how much
workers that share the cores of a host slow each other down (`host.py`). `baton profile` measures
all of it.

Independent of the router's own performance model, which has to find this out.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.engine.batch import Batch


@dataclass(frozen=True, slots=True)
class Hardware:
    """One worker, its whole tensor-parallel group, and its links. Seconds and bytes."""

    step_fixed_s: float = 0.010
    """Of any step: launches, reading the weights once."""
    prefill_token_s: float = 110e-6
    prefill_pair_s: float = 2.5e-9
    decode_sequence_s: float = 60e-6
    decode_kv_token_s: float = 25e-9
    link_bytes_per_second: float = 20e9
    link_latency_s: float = 0.002
    message_s: float = 0.0005
    """One way between router and worker."""
    step_gap_s: float = 0.0
    """From the end of a step to the start of the next: results are told, commands are taken."""
    request_s: float = 0.0
    """That a request waits outside of workers: it is read, placed, its first token is told."""
    request_token_s: float = 0.0
    """On top, for each token of its prompt."""
    neighbour_share: float = 0.0
    """Of itself that a step takes longer while one other worker of the same host computes."""

    def step_s(self, batch: Batch) -> float:
        """One engine step that computes `batch`."""
        seconds = self.step_fixed_s
        for sequence, num_new in batch.scheduled:
            context = sequence.num_computed_tokens
            if num_new == 1 and len(sequence.token_ids) > len(sequence.request.prompt_token_ids):
                seconds += self.decode_sequence_s + self.decode_kv_token_s * context
            else:
                pairs = num_new * (context + num_new / 2)
                seconds += self.prefill_token_s * num_new + self.prefill_pair_s * pairs
        return seconds

    def move_s(self, num_bytes: int) -> float:
        """Reading so much KV from another worker."""
        return self.link_latency_s + num_bytes / self.link_bytes_per_second
