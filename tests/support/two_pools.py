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

from services.router.admission.admission import Lane
from services.router.admission.decode_forecast import DecodeForecast
from services.router.admission.ticket import Prospect, Ticket, TicketState
from services.router.placement.placement import Prediction

STEP_S = 0.005


@dataclass
class Job:
    """One request in the model."""

    ticket: Ticket
    num_output: int
    arrived_at_s: float
    first_token_at_s: float | None = None
    ended_at_s: float | None = None
    decode: int = 0
    running: object = None
    tokens: float = 0.0

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
        self.batches: list[dict[Ticket, Job]] = [{} for _ in range(self.num_decode)]
        self.expected: list[int] = [0] * self.num_decode
        self.forecast = DecodeForecast()
        self._chosen: dict[Ticket, tuple[int, int, Prediction]] = {}

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
        load = [len(b) + e for b, e in zip(self.batches, self.expected, strict=True)]
        decode = min(range(self.num_decode), key=load.__getitem__)
        queued_s = queued[prefill] * self.error()
        ttft_s = queued_s + ticket.num_prompt_tokens * self.token_s * self.error()
        num_sequences = load[decode] + 1
        if self.uses_forecast:
            until_s = self.now_s + ttft_s
            ending = self.forecast.ending(str(decode), self.now_s, until_s)  # type: ignore[arg-type]
            num_sequences -= ending.num_sequences
        itl_s = (self.itl_fixed_s + self.itl_sequence_s * num_sequences) * self.error()
        predicted = Prediction(ttft_s, itl_s, queued_s)
        self._chosen[ticket] = (prefill, decode, predicted)
        return Prospect(predicted, ticket.num_prompt_tokens, self.num_prefill)

    def launch(self, ticket: Ticket) -> None:
        prefill, decode, predicted = self._chosen.pop(ticket)
        job = self.jobs[ticket]
        job.decode = decode
        self.prefill[prefill].append([job, float(ticket.num_prompt_tokens)])
        self.expected[decode] += 1
        self.admitted_at_s.append(self.now_s)
        ends_at_s = self.now_s + predicted.ttft_s + ticket.num_output_tokens * predicted.itl_s
        job.running = self.forecast.add(str(decode), ends_at_s=ends_at_s, kv_tokens=0)  # type: ignore[arg-type]

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
                    self.expected[job.decode] -= 1
                    self.batches[job.decode][job.ticket] = job
        for batch in self.batches:
            if not batch:
                continue
            itl_s = self.itl_fixed_s + self.itl_sequence_s * len(batch)
            for ticket, job in list(batch.items()):
                job.tokens += STEP_S / itl_s
                if job.tokens >= job.num_output - 1:
                    del batch[ticket]
                    self._end(job)

    def _end(self, job: Job) -> None:
        job.ended_at_s = self.now_s
        self.forecast.remove(str(job.decode), job.running)  # type: ignore[arg-type]
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
