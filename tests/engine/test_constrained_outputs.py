"""Structured outputs, bad words and allowed tokens on a real, tiny model.

What comes out fits, and is the same however the request is computed: at once, launched ahead,
preempted, handed over, replayed.
"""

from __future__ import annotations

import json
import mmap
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import tiny_llama
from baton.core.block import BlockId, chain_hashes, root_hash
from baton.core.clock import ManualClock
from baton.core.errors import InvalidRequest
from baton.core.request import (
    FinishReason,
    GenerateRequest,
    PeerRef,
    RequestId,
    SamplingParams,
    TokenDelta,
    Work,
)
from baton.core.structured import StructuredKind, StructuredSpec
from baton.core.worker_info import Epoch, WorkerId
from baton.engine.batch import Runner
from baton.engine.config import EngineConfig
from baton.engine.engine import Engine
from baton.engine.grammar.compiler import GrammarCompiler
from baton.engine.grammar.vocabulary import grammar_tokenizer
from baton.engine.layers.linear import Linear
from baton.engine.model_runner import ModelRunner
from baton.engine.tokenizer import Tokenizer
from baton.engine.weights import LoadedModel, load_model
from deferred_runner import DeferredRunner

PEER = PeerRef(WorkerId("prefill-0"), Epoch("e"), "127.0.0.1:1")
BLOCK_SIZE = 4
PROMPT = tuple(b"Say it as told: ")
END = tiny_llama.END_TOKEN_ID
SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["a", "bc", None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]?$"},
    },
    "required": ["id", "kind", "tags", "code"],
    "additionalProperties": False,
}
SPECS = {
    "json_schema": StructuredSpec(StructuredKind.JSON_SCHEMA, json.dumps(SCHEMA)),
    "regex": StructuredSpec(StructuredKind.REGEX, r"[0-9]{3}-[a-f]{2,6}"),
    "choice": StructuredSpec.of_choices(("ja", "jawohl", "nein", "größe")),
    "grammar": StructuredSpec(StructuredKind.GRAMMAR, 'start: "(" start ")" | /x{1,3}/'),
}
LONG: dict[str, Any] = {
    "max_tokens": 90,
    # Blanks between the parts of a JSON value are as good to this model as anything.
    "logit_bias": tuple((blank, -30.0) for blank in b"\t\n "),
}
CASES: dict[str, dict[str, Any]] = {
    f"{name} {temperature}": {"structured": spec, "temperature": temperature, "seed": 3} | LONG
    for name, spec in SPECS.items()
    for temperature in (0.0, 1.0)
}
CASES["with penalties"] = {
    "structured": SPECS["json_schema"],
    "temperature": 0.9,
    "seed": 7,
    "top_k": 20,
    "top_p": 0.95,
    "repetition_penalty": 1.2,
    "logprobs": 2,
    "bad_words_ids": (tuple(b"true"), tuple(b"9")),
} | LONG
CASES["bad words"] = {
    "temperature": 0.0,
    "max_tokens": 30,
    "bad_words_ids": ((5,), (7, 9), (1, 2, 3)),
    "logprobs": 1,
}
CASES["allowed tokens"] = {
    "temperature": 1.0,
    "max_tokens": 30,
    "seed": 1,
    "allowed_token_ids": (1, 2, 3, 40, 319),
    "bad_words_ids": ((2, 2),),
    "top_k": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama.write_checkpoint(tmp_path_factory.mktemp("m") / "tiny")
    tiny_llama.write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel[Linear]:
    return load_model(EngineConfig(model_path=folder, dtype="float32"))


@pytest.fixture(scope="module")
def grammars(folder: Path) -> GrammarCompiler:
    return GrammarCompiler(lambda: grammar_tokenizer(Tokenizer.from_folder(folder), 320))


class Worker:
    """An engine over memory of its own, and all it has said."""

    def __init__(
        self,
        model: LoadedModel[Linear],
        grammars: GrammarCompiler | None,
        *,
        is_ahead: bool = False,
        num_blocks: int = 200,
    ) -> None:
        config = EngineConfig(
            model_path=Path("."),
            dtype="float32",
            block_size=BLOCK_SIZE,
            max_num_seqs=6,
            max_num_batched_tokens=24,
        )
        self.layout = model.layout(BLOCK_SIZE)
        self.memory = mmap.mmap(-1, num_blocks * self.layout.block_bytes)
        runner: Runner = ModelRunner(
            model, config, self.layout, num_blocks, memoryview(self.memory)
        )
        if is_ahead:
            runner = DeferredRunner(runner)
        self.engine = Engine(
            config=config,
            layout=self.layout,
            num_blocks=num_blocks,
            max_model_len=model.max_model_len,
            runner=runner,
            clock=ManualClock(),
            vocab_size=model.model_config.vocab_size,
            grammars=grammars,
        )
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, TokenDelta] = {}
        self.blocks: list[BlockId] = []
        self.chunks: list[Any] = []

    def submit(
        self,
        name: str,
        sampling: dict[str, Any],
        work: Work = Work.GENERATE,
        known: tuple[int, ...] = (),
    ) -> None:
        hashes = chain_hashes(root_hash(self.layout.fingerprint), PROMPT, BLOCK_SIZE)
        self.engine.submit(
            GenerateRequest(
                RequestId(name),
                work,
                PROMPT,
                SamplingParams(**sampling),
                block_hashes=tuple(hashes),
                output_token_ids=known,
                eos_token_ids=(END,),
                kv_source=PEER if work.reads_all_kv else None,
            )
        )

    def step(self) -> None:
        output = self.engine.step()
        for delta in output.deltas:
            self.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            if delta.timeline is not None:
                self.ends[delta.request_id] = delta
        self.chunks += output.chunks
        for reservation in output.reservations:
            self.blocks = list(reservation.block_ids)
        self.engine.check_integrity()

    def run(self) -> dict[str, list[int]]:
        while self.engine.has_work:
            self.step()
        return self.tokens

    def read(self, owner: Worker, source: BlockId, target: BlockId) -> None:
        size = self.layout.block_bytes
        block = owner.memory[source * size : (source + 1) * size]
        self.memory[target * size : (target + 1) * size] = block


@pytest.fixture(scope="module")
def expected(model: LoadedModel[Linear], grammars: GrammarCompiler) -> Worker:
    worker = Worker(model, grammars)
    for name, sampling in CASES.items():
        worker.submit(name, sampling)
    worker.run()
    return worker


def text_of(token_ids: list[int]) -> str:
    return bytes(token_ids).decode()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_output_fits_its_specification(expected: Worker, temperature: float) -> None:
    texts = {name: text_of(expected.tokens[f"{name} {temperature}"]) for name in SPECS}
    jsonschema.validate(json.loads(texts["json_schema"]), SCHEMA)
    assert re.fullmatch(SPECS["regex"].text, texts["regex"])
    assert texts["choice"] in SPECS["choice"].choices
    assert re.fullmatch(r"(\()*x{1,3}(\))*", texts["grammar"])
    for name in SPECS:
        end = expected.ends[f"{name} {temperature}"]
        assert (end.finish_reason, end.stop_token_id) == (FinishReason.STOP, END)


def test_other_limits_hold_beside_a_structured_output(expected: Worker) -> None:
    text = text_of(expected.tokens["with penalties"])
    jsonschema.validate(json.loads(text), SCHEMA)
    assert "9" not in text and "true" not in text


def test_bad_words_and_allowed_tokens_hold(expected: Worker) -> None:
    tokens = expected.tokens["bad words"]
    assert len(tokens) == 30 and 5 not in tokens
    assert not any(tokens[i : i + 2] == [7, 9] for i in range(30))
    tokens = expected.tokens["allowed tokens"]
    assert set(tokens) <= {1, 2, 3, 40, 319}
    assert not any(tokens[i : i + 2] == [2, 2] for i in range(30))


def test_bad_words_change_only_what_they_forbid(model: LoadedModel[Linear]) -> None:
    free = Worker(model, None)
    free.submit("r", {"temperature": 0.0, "max_tokens": 12})
    tokens = free.run()["r"]
    banned = Worker(model, None)
    word = tuple(tokens[3:6])
    banned.submit("r", {"temperature": 0.0, "max_tokens": 12, "bad_words_ids": (word,)})
    other = banned.run()["r"]
    first_difference = next(i for i in range(12) if other[i] != tokens[i])
    assert tuple(tokens[first_difference - 2 : first_difference + 1]) == word


def test_launched_ahead_and_preempted_outputs_are_the_same(
    model: LoadedModel[Linear], grammars: GrammarCompiler, expected: Worker
) -> None:
    for is_ahead in (False, True):
        worker = Worker(model, grammars, is_ahead=is_ahead, num_blocks=40)
        for name, sampling in CASES.items():
            worker.submit(name, sampling)
        assert worker.run() == expected.tokens
        assert worker.engine.load().num_preemptions > 0
        assert worker.engine.is_empty


@pytest.mark.parametrize("case", CASES)
def test_handed_over_outputs_are_the_same(
    model: LoadedModel[Linear], grammars: GrammarCompiler, expected: Worker, case: str
) -> None:
    """The first token comes from the prefill worker, the next from the decode worker, the rest from
    one that takes the request over."""
    sampling, owner = CASES[case], Worker(model, grammars)
    owner.submit("r", sampling, Work.PREFILL)
    owner.run()
    reader = Worker(model, grammars)
    reader.submit("r", sampling, Work.DECODE)
    reader.step()
    for chunk in owner.chunks:
        for index, source in enumerate(chunk.block_ids, start=chunk.first_block_index):
            reader.read(owner, source, reader.blocks[index])
    reader.engine.activate(RequestId("r"), owner.chunks[-1].first_token)
    owner.engine.release_lease(RequestId("r"))
    while "r" not in reader.ends and len(reader.tokens.get("r", ())) < 2:
        reader.step()
    known = owner.tokens["r"] + reader.tokens.get("r", [])
    assert known == expected.tokens[case][: len(known)]
    if "r" not in reader.ends:
        third = Worker(model, grammars)
        third.submit("r", sampling, Work.TAKEOVER, tuple(known))
        third.step()
        reader.engine.start_handover(RequestId("r"), num_known_tokens=len(known))
        reader.engine.freeze(RequestId("r"))
        reader.step()
        for chunk in reader.chunks:
            for index, source in enumerate(chunk.block_ids, start=chunk.first_block_index):
                third.read(reader, source, third.blocks[index])
        reader.engine.finish_handover(RequestId("r"))
        reader.step()
        third.engine.activate(RequestId("r"), reader.chunks[-1].first_token)
        third.run()
        known = owner.tokens["r"] + reader.tokens["r"] + third.tokens.get("r", [])
        assert third.engine.is_empty
    assert known == expected.tokens[case]
    assert owner.engine.is_empty and reader.engine.is_empty


@pytest.mark.parametrize("num_known", [1, 5])
@pytest.mark.parametrize("case", ["json_schema 1.0", "with penalties", "bad words"])
def test_replayed_outputs_are_the_same(
    model: LoadedModel[Linear],
    grammars: GrammarCompiler,
    expected: Worker,
    case: str,
    num_known: int,
) -> None:
    known = expected.tokens[case][:num_known]
    worker = Worker(model, grammars)
    worker.submit("again", CASES[case], known=tuple(known))
    assert known + worker.run()["again"] == expected.tokens[case]


def test_max_tokens_cuts_a_structured_output(
    model: LoadedModel[Linear], grammars: GrammarCompiler
) -> None:
    worker = Worker(model, grammars)
    worker.submit("r", CASES["json_schema 1.0"] | {"max_tokens": 5})
    assert len(worker.run()["r"]) == 5
    assert worker.ends["r"].finish_reason is FinishReason.LENGTH


def test_known_output_that_does_not_fit_ends_the_request_alone(
    model: LoadedModel[Linear], grammars: GrammarCompiler, expected: Worker
) -> None:
    worker = Worker(model, grammars)
    worker.submit("odd", CASES["regex 1.0"], known=tuple(b"zzz"))
    worker.submit("regex 1.0", CASES["regex 1.0"])
    assert worker.run()["regex 1.0"] == expected.tokens["regex 1.0"]
    end = worker.ends["odd"]
    assert end.finish_reason is FinishReason.ERROR and not end.is_retryable
    assert "structured output cannot go on" in end.error
    assert worker.engine.is_empty


def test_impossible_specification_ends_its_request_with_the_reason(
    model: LoadedModel[Linear], grammars: GrammarCompiler
) -> None:
    spec = StructuredSpec(StructuredKind.REGEX, "(")
    worker = Worker(model, grammars)
    worker.submit("r", {"structured": spec})
    worker.run()
    assert worker.ends["r"].finish_reason is FinishReason.ERROR
    assert "regex cannot be used" in worker.ends["r"].error
    # It is remembered.
    with pytest.raises(InvalidRequest, match="regex cannot be used"):
        worker.submit("again", {"structured": spec})
    assert worker.engine.is_empty


def test_engine_without_grammars_refuses_structured_outputs(model: LoadedModel[Linear]) -> None:
    worker = Worker(model, None)
    with pytest.raises(InvalidRequest, match="no structured outputs"):
        worker.submit("r", CASES["regex 0.0"])
    assert worker.engine.is_empty


def test_ids_outside_the_vocabulary_are_refused(model: LoadedModel[Linear]) -> None:
    worker = Worker(model, None)
    for name, value in (("allowed_token_ids", (320,)), ("bad_words_ids", ((3, 999),))):
        with pytest.raises(InvalidRequest, match="outside the vocabulary") as caught:
            worker.submit("r", {name: value})
        assert caught.value.param in name
    assert worker.engine.is_empty


def test_stop_token_is_included_on_request(model: LoadedModel[Linear]) -> None:
    free = Worker(model, None)
    free.submit("r", {"temperature": 0.0, "max_tokens": 8})
    tokens = free.run()["r"]
    stop = {"temperature": 0.0, "max_tokens": 8, "stop_token_ids": (tokens[4],), "logprobs": 0}
    first = tokens.index(tokens[4])
    for is_included in (False, True):
        worker = Worker(model, None)
        worker.submit("r", stop | {"include_stop_token": is_included})
        assert worker.run()["r"] == tokens[: first + is_included]
        end = worker.ends["r"]
        assert (end.finish_reason, end.stop_token_id) == (FinishReason.STOP, tokens[4])
        assert len(end.logprobs) == is_included


def test_cancelled_while_its_grammar_is_compiled(model: LoadedModel[Linear]) -> None:
    compiler = NeverCompiling()
    worker = Worker(model, compiler)
    worker.submit("local", CASES["regex 0.0"])
    worker.submit("reserved", CASES["regex 0.0"], Work.DECODE)
    worker.submit("free", {"temperature": 0.0, "max_tokens": 3})
    for _ in range(6):
        worker.step()
    assert len(worker.tokens["free"]) == 3 and "local" not in worker.tokens
    for name in ("local", "reserved"):
        worker.engine.cancel(RequestId(name))
    worker.step()
    assert worker.ends["local"].finish_reason is FinishReason.CANCELLED
    worker.engine.abandon(RequestId("reserved"), unsettled=())
    worker.step()
    assert worker.engine.is_empty


class NeverCompiling(GrammarCompiler):
    def __init__(self) -> None:
        super().__init__(lambda: pytest.fail("not needed"))

    def start(self, spec: StructuredSpec) -> Any:
        from concurrent.futures import Future

        return Future()
