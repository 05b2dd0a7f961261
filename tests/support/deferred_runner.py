"""Makes a runner that computes while it launches behave like one with two steps in flight.

Results come when the step is waited for; the tokens that the launch before has sampled are put in
by the runner itself, as a device does that never shows them to its host in between.
"""

from __future__ import annotations

from baton.core.request import RequestId
from baton.engine.batch import Batch, LaunchedStep, Runner, SampledToken


class DeferredStep:
    def __init__(self, index: int, results: list[SampledToken | None], log: list[str]) -> None:
        self._index = index
        self._results = results
        self._log = log

    def wait(self) -> list[SampledToken | None]:
        self._log.append(f"wait {self._index}")
        return self._results


class DeferredRunner:
    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._sampled: dict[RequestId, int] = {}
        self._num_launched = 0
        self.log: list[str] = []
        """Launches and waits, in order."""
        self.num_pending_tokens = 0
        """Tokens that were put in, in all."""

    @property
    def max_in_flight(self) -> int:
        return 2

    def launch(self, batch: Batch) -> LaunchedStep:
        pending = [sequence for sequence, _ in batch.scheduled if sequence.num_pending_tokens]
        for sequence in pending:
            sequence.token_ids.append(self._sampled[sequence.request_id])
            sequence.num_pending_tokens -= 1
        try:
            results = self._runner.launch(batch).wait()
        finally:
            for sequence in pending:
                sequence.token_ids.pop()
                sequence.num_pending_tokens += 1
        self.num_pending_tokens += len(pending)
        self._sampled = {
            sequence.request_id: result.token_id
            for (sequence, _), result in zip(batch.scheduled, results, strict=True)
            if result is not None
        }
        self._num_launched += 1
        self.log.append(f"launch {self._num_launched}")
        return DeferredStep(self._num_launched, results, self.log)
