"""What structured outputs cost, and whether they keep their word.

    python -m bench.grammar [--batch 32] [--steps 40] [--rounds 5]        cost of masks in decoding
    python -m bench.grammar --valid 1000                                  outputs that fit, of 1,000

Cost: one engine decodes full batches, with and without a JSON schema in turns; a round is the time
of `steps` steps in which every sequence gets a token, and the overhead that of the medians.
Valid: schemas of several kinds in turn at temperature 1, each output read by `jsonschema`; one that
max_tokens cut does not fit. JSON goes to bench/results or --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema

from baton.core.clock import WallClock
from baton.core.request import FinishReason, GenerateRequest, RequestId, SamplingParams, Work
from baton.core.structured import StructuredKind, StructuredSpec
from baton.engine.config import EngineConfig
from baton.engine.engine import Engine
from baton.engine.factory import build_engine
from baton.engine.tokenizer import Tokenizer
from bench import machine

DEFAULT_MODEL = Path.home() / ".cache/baton/models/float32/SmolLM2-135M-Instruct"
MAX_OVERHEAD = 0.05
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "role": {"enum": ["admin", "user", "guest", None]},
    },
    "required": ["name", "age", "role"],
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": PERSON, "minItems": 500}
"""No output of a round reaches its end."""
SCHEMAS: dict[str, dict[str, Any]] = {
    "flat": PERSON,
    "nested": {
        "type": "object",
        "properties": {
            "id": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
            "owner": PERSON,
            "place": {
                "type": "object",
                "properties": {
                    "lat": {"type": "number", "minimum": -90, "maximum": 90},
                    "lon": {"type": "number", "minimum": -180, "maximum": 180},
                },
                "required": ["lat", "lon"],
                "additionalProperties": False,
            },
        },
        "required": ["id", "owner", "place"],
        "additionalProperties": False,
    },
    "array": {
        "type": "array",
        "items": {"type": "integer", "minimum": -100, "maximum": 100},
        "minItems": 1,
        "maxItems": 8,
    },
    "choice of objects": {
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    "kind": {"const": "text"},
                    "text": {"type": "string", "maxLength": 30},
                },
                "required": ["kind", "text"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {"kind": {"const": "flag"}, "on": {"type": "boolean"}},
                "required": ["kind", "on"],
                "additionalProperties": False,
            },
        ]
    },
    "date and enum": {
        "type": "object",
        "properties": {
            "day": {"type": "string", "format": "date"},
            "sizes": {"type": "array", "items": {"enum": ["s", "m", "l"]}, "maxItems": 4},
            "price": {"type": "number", "minimum": 0, "exclusiveMaximum": 1000},
        },
        "required": ["day", "sizes", "price"],
        "additionalProperties": False,
    },
}
VALID_MAX_TOKENS = 400
KV_CACHE_BYTES = 1 << 30
QUESTION = "Answer in JSON: describe a person, a place or a thing."


def structured(schema: dict[str, Any]) -> StructuredSpec:
    return StructuredSpec(StructuredKind.JSON_SCHEMA, json.dumps(schema))


class Driver:
    """One engine and the prompt that all requests share."""

    def __init__(self, model: Path, batch: int, threads: int | None) -> None:
        self.tokenizer = Tokenizer.from_folder(model)
        self.batch = batch
        config = EngineConfig(
            model_path=model,
            dtype="float32",
            num_threads=threads,
            max_num_seqs=batch,
            max_num_batched_tokens=max(512, batch),
            kv_cache_bytes=KV_CACHE_BYTES,
        )
        self.engine: Engine = build_engine(config, clock=WallClock()).engine
        text = QUESTION
        if self.tokenizer.has_chat_template:
            text = self.tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}])
        self.prompt = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        self._num_submitted = 0

    def submit(self, sampling: SamplingParams) -> RequestId:
        self._num_submitted += 1
        request_id = RequestId(f"r{self._num_submitted}")
        eos = self.tokenizer.eos_token_ids
        self.engine.submit(
            GenerateRequest(request_id, Work.GENERATE, self.prompt, sampling, eos_token_ids=eos)
        )
        return request_id

    def seconds(self, spec: StructuredSpec | None, num_steps: int) -> float:
        """Of `num_steps` steps of a full batch, after all prompts."""
        names = []
        for i in range(self.batch):
            sampling = SamplingParams(
                max_tokens=num_steps + 50,
                temperature=1.0,
                seed=i,
                structured=spec,
                ignore_eos=spec is None,
            )
            names.append(self.submit(sampling))
        started: set[str] = set()
        while len(started) < self.batch:
            started.update(delta.request_id for delta in self.engine.step().deltas)
        start = time.perf_counter()
        num_tokens = sum(
            len(d.token_ids) for _ in range(num_steps) for d in self.engine.step().deltas
        )
        seconds = time.perf_counter() - start
        for name in names:
            self.engine.cancel(name)
        while self.engine.has_work:
            self.engine.step()
        if num_tokens != num_steps * self.batch:
            raise RuntimeError(f"{num_tokens} tokens in {num_steps} steps of {self.batch}")
        return seconds

    def outputs(self, num_outputs: int) -> Iterator[tuple[str, str, FinishReason | None]]:
        """(schema, text, how it ended), as they end; a batch's worth of requests at a time."""
        names = list(SCHEMAS)
        schema_of: dict[str, str] = {}
        tokens: dict[str, list[int]] = {}
        while True:
            while len(tokens) < self.batch and len(schema_of) < num_outputs:
                schema = names[len(schema_of) % len(names)]
                sampling = SamplingParams(
                    max_tokens=VALID_MAX_TOKENS,
                    temperature=1.0,
                    seed=len(schema_of),
                    structured=structured(SCHEMAS[schema]),
                )
                name = self.submit(sampling)
                schema_of[name], tokens[name] = schema, []
            if not tokens:
                return
            for delta in self.engine.step().deltas:
                tokens[delta.request_id] += delta.token_ids
                if delta.finish_reason is not None:
                    text = self.tokenizer.decode(tokens.pop(delta.request_id))
                    yield schema_of[delta.request_id], text, delta.finish_reason


def fits(text: str, schema: dict[str, Any]) -> bool:
    try:
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        jsonschema.validate(json.loads(text), schema, format_checker=checker)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def measure_cost(driver: Driver, num_steps: int, num_rounds: int) -> dict[str, Any]:
    spec = structured(ENDLESS)
    for warm_up in (None, spec):
        driver.seconds(warm_up, 3)
    free: list[float] = []
    masked: list[float] = []
    for _ in range(num_rounds):
        free.append(driver.seconds(None, num_steps))
        masked.append(driver.seconds(spec, num_steps))
    rates = [driver.batch * num_steps / statistics.median(seconds) for seconds in (free, masked)]
    return {
        "batch": driver.batch,
        "steps": num_steps,
        "free_s": free,
        "masked_s": masked,
        "free_tokens_per_s": rates[0],
        "masked_tokens_per_s": rates[1],
        "overhead": 1 - rates[1] / rates[0],
    }


def measure_validity(driver: Driver, num_outputs: int) -> dict[str, Any]:
    misfits: list[dict[str, str]] = []
    counts = dict.fromkeys(SCHEMAS, 0)
    for done, (schema, text, reason) in enumerate(driver.outputs(num_outputs), start=1):
        counts[schema] += 1
        if not fits(text, SCHEMAS[schema]):
            ended = "" if reason is None else reason.value
            misfits.append({"schema": schema, "text": text, "finish_reason": ended})
        if done % 50 == 0:
            print(f"  {done} of {num_outputs}, {len(misfits)} do not fit", flush=True)
    return {"outputs": num_outputs, "by_schema": counts, "misfits": misfits}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--valid", type=int, default=0, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args(arguments)
    driver = Driver(options.model, options.batch, options.threads)
    result: dict[str, Any] = {"machine": machine.describe(), "model": options.model.name}
    if options.valid:
        result["valid"] = found = measure_validity(driver, options.valid)
        is_met = not found["misfits"]
        print(f"{options.valid - len(found['misfits'])} of {options.valid} outputs fit")
    else:
        result["cost"] = cost = measure_cost(driver, options.steps, options.rounds)
        is_met = cost["overhead"] <= MAX_OVERHEAD
        print(
            f"batch {cost['batch']}: {cost['free_tokens_per_s']:.1f} tokens/s free, "
            f"{cost['masked_tokens_per_s']:.1f} with a schema: {cost['overhead']:.1%} less"
        )
    print(machine.store("grammar-valid" if options.valid else "grammar-cost", result, options.out))
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
