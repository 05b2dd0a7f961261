"""Two pools of workers in virtual time, as simple as they can be and still queue.

Prefill workers compute one prompt after the other. A decode worker gives all its sequences a token
every `itl_fixed_s + itl_sequence_s x batch`. Predictions are those of the placement: the load as
it is now, with all that was sent.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from baton.core.worker_info import WorkerId
from services.router.admission.admission import Lane
from services.router.admission.ticket import Prospect, Ticket, TicketState
from services.router.admission.turnover import Turnover
from services.router.placement.placement import Prediction

STEP_S = 0.005


@dataclass(eq=False)
class Job:
    """One request in the model; its client's bound is far away."""

    ticket: Ticket
    num_output: int
    arrived_at_s: float
    first_token_at_s: float | None = None
    ended_at_s: float | None = None
    decode: WorkerId | None = None
    tokens: float = 0.0

    @property
    def num_prompt_tokens(self) -> int:
        return self.ticket.num_prompt_tokens

    @property
    def num_output_tokens(self) -> int:
        return 0 if self.first_token_at_s is None else 1 + int(self.tokens)

    @property
    def max_output_tokens(self) -> int:
        return 1 << 20

    @property
    def ttft_s(self) -> float:
        assert self.first_token_at_s is not None
        return self.first_token_at_s - self.arrived_at_s

    @property
    def itl_s(self) -> float:
        assert self.first_token_at_s is not None and self.ended_at_s is not None
        return (self.ended_at_s - self.first_token_at_s) / max(1, self.num_output - 1)


@dataclass
class TwoPools:
    """The pools and the lane in front of them; `run` advances time."""

    lane: Lane
    num_prefill: int = 2
    num_decode: int = 2
    token_s: float = 0.0002
    itl_fixed_s: float = 0.01
    itl_sequence_s: float = 0.001
    error: Callable[[], float] = lambda: 1.0
    """Factor of predicted over true times."""
    uses_forecast: bool = True
    now_s: float = 0.0
    jobs: dict[Ticket, Job] = field(default_factory=dict)
    ended: list[Job] = field(default_factory=list)
    refused: list[tuple[float, Ticket]] = field(default_factory=list)
    admitted_at_s: list[float] = field(default_factory=list)
    max_queued: int = 0

    def __post_init__(self) -> None:
        self.prefill: list[deque[list[object]]] = [deque() for _ in range(self.num_prefill)]
        names = [WorkerId(f"d{i}") for i in range(self.num_decode)]
        self.batches: dict[WorkerId, dict[Ticket, Job]] = {name: {} for name in names}
        self.expected = dict.fromkeys(names, 0)
        self.turnover = Turnover(256)
        self._chosen: dict[Ticket, tuple[int, WorkerId, Prediction]] = {}

    # What the router would do.

    def arrive(self, job: Job) -> None:
        ticket = job.ticket
        self.jobs[ticket] = job
        refused = self.lane.arrive(ticket, self.prospect(ticket), self.now_s)
        if ticket.state is TicketState.ADMITTED:
            self.launch(ticket)
        self._refuse(refused)
        self.pump()

    def pump(self) -> None:
        self._refuse(self.lane.expire(self.now_s))
        self._refuse(self.lane.pump(self.now_s, self.prospect, self.launch).refused)
        self.max_queued = max(self.max_queued, len(self.lane.queue))

    def prospect(self, ticket: Ticket) -> Prospect:
        queued = [sum(float(item[1]) for item in q) * self.token_s for q in self.prefill]  # type: ignore[arg-type]
        prefill = min(range(self.num_prefill), key=queued.__getitem__)
        load = {name: len(batch) + self.expected[name] for name, batch in self.batches.items()}
        decode = min(load, key=load.__getitem__)
        queued_s = queued[prefill] * self.error()
        ttft_s = queued_s + ticket.num_prompt_tokens * self.token_s * self.error()
        num_sequences: float = load[decode] + 1
        places_per_s = 0.0
        if self.uses_forecast:
            for name, count in load.items():
                per_s = 1 / self._itl_s(max(1, count))
                places_per_s += self.turnover.ending(name, per_s, self.now_s).num_sequences
            steps = ttft_s / self._itl_s(num_sequences)
            num_sequences -= self.turnover.ending(decode, steps, self.now_s).num_sequences
        predicted = Prediction(ttft_s, self._itl_s(num_sequences) * self.error(), queued_s)
        self._chosen[ticket] = (prefill, decode, predicted)
        return Prospect(
            predicted,
            ticket.num_prompt_tokens,
            self.num_prefill,
            decode=decode,
            itl_relief_s=self.itl_sequence_s,
            places_per_s=places_per_s,
            num_decoding=self.num_decode,
        )

    def _itl_s(self, num_sequences: float) -> float:
        return self.itl_fixed_s + self.itl_sequence_s * num_sequences

    def launch(self, ticket: Ticket) -> None:
        prefill, decode, _ = self._chosen.pop(ticket)
        job = self.jobs[ticket]
        job.decode = decode
        self.prefill[prefill].append([job, float(ticket.num_prompt_tokens)])
        self.expected[decode] += 1
        self.admitted_at_s.append(self.now_s)
        self.turnover.add(decode, job)

    # The workers.

    def step(self) -> None:
        self.now_s += STEP_S
        for queue in self.prefill:
            budget = STEP_S / self.token_s
            while queue and budget > 0:
                job, left = queue[0]
                assert isinstance(job, Job) and isinstance(left, float)
                done = min(left, budget)
                queue[0][1] = left - done
                budget -= done
                if left - done <= 1e-9:
                    queue.popleft()
                    job.first_token_at_s = self.now_s
                    assert job.decode is not None
                    self.expected[job.decode] -= 1
                    self.batches[job.decode][job.ticket] = job
        for batch in self.batches.values():
            itl_s = self._itl_s(len(batch))
            for ticket, job in list(batch.items()):
                job.tokens += STEP_S / itl_s
                if job.tokens >= job.num_output - 1:
                    del batch[ticket]
                    self._end(job)

    def _end(self, job: Job) -> None:
        job.ended_at_s = self.now_s
        assert job.decode is not None
        self.turnover.remove(job.decode, job)
        self.lane.end(
            job.ticket,
            num_uncached_tokens=job.ticket.num_prompt_tokens,
            num_output_tokens=job.num_output,
        )
        self.lane.learn(
            job.ticket,
            ttft_s=job.ttft_s,
            mean_itl_s=job.itl_s if job.num_output > 1 else None,
            num_output_tokens=job.num_output,
        )
        self.ended.append(job)

    def _refuse(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            self.refused.append((self.now_s, ticket))

    def run(self, arrivals: list[tuple[float, Job]], *, until_s: float) -> None:
        """`arrivals`: (time, request), sorted."""
        waiting = deque(arrivals)
        while self.now_s < until_s:
            self.step()
            while waiting and waiting[0][0] <= self.now_s:
                at_s, job = waiting.popleft()
                job.ticket.arrived_at_s = job.arrived_at_s = at_s
                self.arrive(job)
            self.pump()


def poisson(rate: float, until_s: float, rng: random.Random) -> list[float]:
    """Arrival times."""
    times: list[float] = []
    at_s = rng.expovariate(rate)
    while at_s < until_s:
        times.append(at_s)
        at_s += rng.expovariate(rate)
    return times
