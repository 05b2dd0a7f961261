"""The router of the soak: what clients asked for, which tokens they got, who generates them now.

Every token must come exactly once, in order, and be the one an undisturbed run would sample.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from baton.core.block import BlockHash, chain_hashes, root_hash
from baton.core.request import (
    FinishReason,
    GenerateRequest,
    PeerRef,
    RequestId,
    SamplingParams,
    TokenDelta,
    Work,
)
from soak_worker import BLOCK_SIZE, VOCAB, Worker, load_engine_helper

ROOT = root_hash("soak")
EOS = 60
_STEMS = (7, 11, 13)


@dataclass(slots=True, eq=False)
class Call:
    """One request of one client, through all its attempts."""

    number: int
    prompt: tuple[int, ...]
    max_tokens: int
    expected: list[int]
    tokens: list[int] = field(default_factory=list)
    num_attempts: int = 0
    source: Worker | None = None
    """Computes the prompt for `home`."""
    home: Worker | None = None
    """Generates; None while it waits to be submitted."""
    target: Worker | None = None
    """Is taking over from `home`."""
    is_over: bool = False

    @property
    def request_id(self) -> RequestId:
        """Of this attempt; a takeover goes by the same."""
        return RequestId(f"q{self.number}.{self.num_attempts}")

    def workers(self) -> list[Worker]:
        return [w for w in (self.source, self.home, self.target) if w is not None]


class Router:
    def __init__(self, rng: random.Random, events: Counter[str]) -> None:
        self._rng = rng
        self._events = events
        self._fake = load_engine_helper("fake_runner")
        self._by_request: dict[RequestId, Call] = {}
        self.waiting: list[Call] = []
        self.open: list[Call] = []
        self.chains: list[list[BlockHash]] = []
        """Of the last calls, outputs included."""
        self.contents: dict[BlockHash, list[int]] = {}
        """What the memory of a block of that hash holds."""
        self.num_calls = 0

    def new_call(self) -> None:
        rng = self._rng
        stem = rng.choice(_STEMS)
        shared = [(stem * i + 1) % VOCAB for i in range(rng.randrange(25))]
        prompt = (*shared, *(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 6))))
        max_tokens = rng.randrange(1, 61)
        expected = self._fake.expected_output(prompt, max_tokens, VOCAB, (EOS,))
        self.num_calls += 1
        call = Call(self.num_calls, prompt, max_tokens, expected)
        self.waiting.append(call)
        self.open.append(call)
        # Blocks are known by their whole past: also by what is sampled and not sent.
        whole = [*prompt, *self._fake.expected_output(prompt, max_tokens + 1, VOCAB)]
        chain = chain_hashes(ROOT, whole, BLOCK_SIZE)
        values = self._fake.fingerprints(whole)
        for i, block_hash in enumerate(chain):
            self.contents[block_hash] = values[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE]
        self.chains = [*self.chains[-20:], chain]

    def place(self, workers: list[Worker]) -> None:
        """Submit a waiting call: to one worker, or to a pair."""
        call = self.waiting.pop(self._rng.randrange(len(self.waiting)))
        call.num_attempts += 1
        self._by_request[call.request_id] = call
        call.source = call.target = None
        if self._rng.random() < 0.4:
            call.home = self._rng.choice(workers)
            call.home.submit(self._request(call, Work.GENERATE))
            return
        call.source, call.home = self._rng.sample(workers, 2)
        call.home.submit(self._request(call, Work.DECODE, call.source))
        if call.source is not None:
            call.source.submit(self._request(call, Work.PREFILL))

    def take_over(self, workers: list[Worker]) -> None:
        calls = [c for c in self.open if c.home is not None and c.target is None]
        if self._rng.random() < 0.9:
            # The others are refused: they do not generate yet.
            calls = [c for c in calls if len(c.tokens) > 1]
        if not calls:
            return
        calls = self._rng.sample(calls, min(3, len(calls)))
        call = max(calls, key=lambda c: len(c.expected) - len(c.tokens))
        others = [w for w in workers if w is not call.home and call.request_id not in w.live]
        if not others:
            return
        call.target = self._rng.choice(others)
        self._events["takeovers"] += 1
        call.target.submit(self._request(call, Work.TAKEOVER, call.home))

    def give_up_takeover(self) -> None:
        """The router changes its mind."""
        moving = [c for c in self.open if c.target is not None]
        if moving:
            call = self._rng.choice(moving)
            assert call.target is not None
            call.target.cancel(call.request_id)
            call.target = None

    def cancel(self) -> None:
        """A client goes away."""
        if self.open:
            self._end(self._rng.choice(self.open))
            self._events["cancelled"] += 1

    def died(self, worker: Worker) -> None:
        for call in list(self.open):
            if worker is call.target:
                call.target = None
            if worker in (call.home, call.source):
                self._replay(call)

    def on_delta(self, worker: Worker, delta: TokenDelta) -> None:
        call = self._by_request.get(delta.request_id)
        if call is None or call.is_over or delta.request_id != call.request_id:
            return
        if delta.token_ids:
            assert worker in call.workers(), f"tokens of call {call.number} from a stranger"
            assert delta.first_index == len(call.tokens), (
                f"call {call.number} has {len(call.tokens)} tokens, got more at {delta.first_index}"
            )
            call.tokens += delta.token_ids
            assert call.tokens == call.expected[: len(call.tokens)], f"call {call.number}: wrong"
        if delta.timeline is not None or delta.finish_reason is not None:
            self._on_last(worker, call, delta)

    def _on_last(self, worker: Worker, call: Call, delta: TokenDelta) -> None:
        reason = delta.finish_reason
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert call.tokens == call.expected, f"call {call.number} ended early"
            self._events["finished"] += 1
            self._end(call)
        elif reason is not None and worker is call.target:
            self._events["takeovers that gave way"] += 1
            call.target = None
        elif reason is not None:
            self._replay(call)
        elif worker is call.source:
            call.source = None
        else:
            assert worker is call.home, f"call {call.number} was handed on by a stranger"
            call.home, call.target = call.target, None
            if call.home is None:
                # To one that has failed since: nobody has it now.
                self._replay(call)

    def _replay(self, call: Call) -> None:
        self._events["replays"] += 1
        self._leave(call)
        call.source = call.home = call.target = None
        self.waiting.append(call)

    def _end(self, call: Call) -> None:
        call.is_over = True
        self.open.remove(call)
        if call in self.waiting:
            self.waiting.remove(call)
        self._leave(call)

    def _leave(self, call: Call) -> None:
        """Nothing of this attempt is wanted any more, wherever it is."""
        for worker in call.workers():
            if not worker.is_dead:
                worker.cancel(call.request_id)

    def _request(self, call: Call, work: Work, source: Worker | None = None) -> GenerateRequest:
        return GenerateRequest(
            request_id=call.request_id,
            work=work,
            prompt_token_ids=call.prompt,
            sampling=SamplingParams(temperature=0.0, max_tokens=call.max_tokens),
            block_hashes=tuple(chain_hashes(ROOT, call.prompt, BLOCK_SIZE)),
            output_token_ids=tuple(call.tokens),
            eos_token_ids=(EOS,),
            kv_source=PeerRef(source.worker_id, source.epoch, "") if source is not None else None,
            deadline_s=self._rng.choice([4.0, 30.0]),
        )
