"""An engine with a checking runner, and everything it has said so far."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baton.core.block import BlockHash, BlockId, chain_hashes, root_hash
from baton.core.clock import ManualClock
from baton.core.kv_layout import KvLayout
from baton.core.request import (
    FinishReason,
    GenerateRequest,
    PeerRef,
    RequestId,
    SamplingParams,
    TokenDelta,
    Work,
)
from baton.core.worker_info import Epoch, WorkerId
from baton.engine.batch import Runner
from baton.engine.config import EngineConfig
from baton.engine.engine import ChunkDone, Engine, Reservation, StepOutput
from baton.engine.grammar.gate import Compiler

ROOT = root_hash("layout-under-test")
PEER = PeerRef(WorkerId("prefill-0"), Epoch("e"), "127.0.0.1:1")
_SAMPLING_FIELDS = {"max_tokens", "min_tokens", "ignore_eos", "stop_token_ids", "structured"}


def make_request(
    request_id: str,
    prompt: SequenceOf[int],
    *,
    work: Work = Work.GENERATE,
    block_size: int = 4,
    is_cached: bool = True,
    **fields: Any,
) -> GenerateRequest:
    """Sampling fields and request fields by keyword."""
    sampling = {name: fields.pop(name) for name in list(fields) if name in _SAMPLING_FIELDS}
    return GenerateRequest(
        request_id=RequestId(request_id),
        work=work,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(temperature=0.0, **sampling),
        block_hashes=tuple(chain_hashes(ROOT, prompt, block_size)) if is_cached else (),
        kv_source=PEER if work.reads_all_kv else None,
        **fields,
    )


def make_engine(
    runner: Runner,
    *,
    num_blocks: int,
    block_size: int = 4,
    max_model_len: int = 4096,
    vocab_size: int | None = None,
    clock: ManualClock | None = None,
    grammars: Compiler | None = None,
    **config: Any,
) -> Engine:
    config.setdefault("max_num_seqs", 4)
    config.setdefault("max_num_batched_tokens", 16)
    return Engine(
        config=EngineConfig(model_path=Path("unused"), block_size=block_size, **config),
        layout=KvLayout("model", 1, 1, 8, block_size, "float32"),
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        runner=runner,
        clock=clock or ManualClock(1000.0),
        vocab_size=vocab_size,
        grammars=grammars,
    )


@dataclass
class Record:
    """What an engine said about one request."""

    token_ids: list[int] = field(default_factory=list)
    deltas: list[TokenDelta] = field(default_factory=list)
    chunks: list[ChunkDone] = field(default_factory=list)
    reservation: Reservation | None = None

    @property
    def last(self) -> TokenDelta | None:
        """The delta that ended the request here."""
        ends = [d for d in self.deltas if d.timeline is not None]
        assert len(ends) <= 1, f"{len(ends)} ends: {ends}"
        assert not ends or ends[0] is self.deltas[-1], "a delta followed the last one"
        return ends[0] if ends else None

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.last.finish_reason if self.last else None

    @property
    def announced(self) -> list[BlockId]:
        return [b for chunk in self.chunks for b in chunk.block_ids]


class Harness:
    """Steps an engine with all checks on, and mirrors the hashes it reports."""

    def __init__(self, engine: Engine, runner: Any, clock: ManualClock) -> None:
        self.engine = engine
        self.runner = runner
        self.clock = clock
        self.records: dict[str, Record] = {}
        self.hashes: set[BlockHash] = set()
        self.num_steps = 0

    def submit(self, request_id: str, prompt: SequenceOf[int], **fields: Any) -> None:
        self.engine.submit(
            make_request(request_id, prompt, block_size=self.runner.block_size, **fields)
        )
        self.records.setdefault(request_id, Record())

    def step(self) -> StepOutput:
        self.num_steps += 1
        self.clock.advance(0.01)
        output = self.engine.step()
        self._record(output)
        self.check()
        return output

    def complete(self) -> list[StepOutput]:
        """Step until the batch that the first step launches, if it does, is over."""
        index = len(self.runner.batches)
        outputs = [self.step()]
        if len(self.runner.batches) > index:
            while self.runner.is_in_flight(index):
                outputs.append(self.step())
        return outputs

    def run(self, max_steps: int = 500) -> None:
        """Step until there is nothing to do."""
        for _ in range(max_steps):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError(f"still busy after {max_steps} steps: {self.engine.load()}")

    def check(self) -> None:
        self.engine.check_integrity()
        assert not self.runner.violations, self.runner.violations[0]

    def read_from(self, owner: Harness, request_id: str) -> None:
        """Copy the KV that `owner` announced into our reservation, as a transfer would."""
        reservation = self.records[request_id].reservation
        assert reservation is not None
        self.copy(owner, owner.records[request_id].announced, reservation)

    def copy(self, owner: Harness, sources: SequenceOf[BlockId], into: Reservation) -> None:
        """Copy the blocks that follow the ones `into` has already."""
        for i in range(into.num_cached_blocks, len(sources)):
            data = owner.runner.read_blocks([sources[i]])
            self.runner.write_blocks([into.block_ids[i]], data)

    def _record(self, output: StepOutput) -> None:
        for delta in output.deltas:
            record = self.records[delta.request_id]
            record.deltas.append(delta)
            record.token_ids += delta.token_ids
        for chunk in output.chunks:
            record = self.records[chunk.request_id]
            if record.chunks and chunk.first_block_index == 0:
                # A handover after one that has ended.
                record.chunks = []
            assert chunk.first_block_index == len(record.announced)
            record.chunks.append(chunk)
        for reservation in output.reservations:
            self.records[reservation.request_id].reservation = reservation
        assert not self.hashes & set(output.stored), "stored twice"
        assert set(output.removed) <= self.hashes, "removed what was never stored"
        self.hashes = (self.hashes | set(output.stored)) - set(output.removed)
        assert self.hashes == set(self.engine.cached_hashes())


def assert_engine_empty(engine: Engine) -> None:
    """Nothing leaked: every block is free or cached, nobody holds, waits or leases."""
    engine.check_integrity()
    assert engine.is_empty
    assert not engine.has_work
    load = engine.load()
    assert load.free_blocks + load.cached_blocks == load.total_blocks
    assert (load.leases, load.reservations, load.quarantined_blocks) == (0, 0, 0)
    assert (load.num_running, load.num_waiting) == (0, 0)
    assert (load.queued_prefill_tokens, load.resident_kv_tokens) == (0, 0)
