"""One request, however it is asked and wherever it is computed, has one answer."""

from __future__ import annotations

from typing import Any

import grpc
import httpx
import pytest

from api_calls import CHAT, COMPLETIONS, calls_of, stream, text_of
from baton.rpc.v1 import inference_pb2 as pb
from baton.rpc.v1 import (
    inference_pb2_grpc,
    open_inference_pb2,
    open_inference_pb2_grpc,
    worker_pb2,
)
from running_system import RunningSystem

pytestmark = pytest.mark.model

MESSAGES = [("system", "You are brief."), ("user", "Name three colours, please.")]
PARAMETERS = '{"type":"object","properties":{"c":{"enum":["red","blue"]}},"required":["c"]}'
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1.2, "seed": 7, "top_k": 50, "top_p": 0.9},
    "penalties": {"temperature": 0, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    "logprobs": {"temperature": 0, "logprobs": 2},
    "stop": {"temperature": 0, "stop": ["e", " the"]},
    "structured": {"temperature": 1, "seed": 3, "guided_regex": "[a-z]{3,9}( [a-z]{3,9}){2}"},
    # Of the whole vocabulary, a token of the far tail may be drawn in place of its neighbour when a
    # logit differs in its last bit.
    "choices": {"temperature": 1.0, "seed": 5, "n": 2, "top_k": 20},
}
NUM_TOKENS = 20


def chat_body(fields: dict[str, Any]) -> dict[str, Any]:
    body = {
        "messages": [{"role": role, "content": content} for role, content in MESSAGES],
        "max_tokens": NUM_TOKENS,
        **fields,
    }
    if "logprobs" in fields:
        body |= {"logprobs": True, "top_logprobs": fields["logprobs"]}
    return body


def grpc_request(fields: dict[str, Any]) -> pb.ChatRequest:
    others = ("stop", "n", "guided_regex")
    sampling = worker_pb2.SamplingParams(
        max_tokens=NUM_TOKENS, **{k: v for k, v in fields.items() if k not in others}
    )
    if "guided_regex" in fields:
        sampling.structured.kind = worker_pb2.STRUCTURED_KIND_REGEX
        sampling.structured.text = fields["guided_regex"]
    return pb.ChatRequest(
        messages=[pb.ChatMessage(role=role, content=content) for role, content in MESSAGES],
        sampling=sampling,
        stop=fields.get("stop", ()),
        options=pb.RequestOptions(n=fields["n"]) if "n" in fields else None,
    )


def over_grpc(system: RunningSystem, request: pb.ChatRequest) -> list[pb.InferenceDelta]:
    with grpc.insecure_channel(f"127.0.0.1:{system.grpc_port}") as channel:
        return list(inference_pb2_grpc.InferenceStub(channel).Chat(request, timeout=60))


@pytest.fixture(scope="module")
def local_system(start_system, exact_arguments) -> RunningSystem:
    """Computes short prompts where it generates; of settings given twice the later holds."""
    return start_system(
        "--no-ray", *exact_arguments, "--set", "router.policy.local_prefill_max_tokens=4096"
    )


@pytest.mark.parametrize("name", CASES)
def test_answer_is_the_same_everywhere(client, system, local_system, name):
    fields = CASES[name]
    body = chat_body(fields)
    num_choices = fields.get("n", 1)
    wanted = client.post(CHAT, json=body).json()["choices"]
    texts = [choice["message"]["content"] for choice in wanted]
    assert len(texts) == num_choices and all(texts)
    with httpx.Client(base_url=local_system.url, timeout=60, trust_env=False) as local:
        there = local.post(CHAT, json=body).json()["choices"]
    assert [choice["message"] for choice in there] == [choice["message"] for choice in wanted]
    chunks = stream(client, CHAT, body)
    deltas = over_grpc(system, grpc_request(fields))
    for index, text in enumerate(texts):
        assert text_of(chunks, index) == text
        assert "".join(d.text for d in deltas if d.index == index) == text
    if "logprobs" in fields:
        entries = wanted[0]["logprobs"]["content"]
        found = [entry for d in deltas for entry in d.logprobs]
        assert [e.logprob for e in found] == pytest.approx(
            [e["logprob"] for e in entries], abs=1e-5
        )
        assert [e["logprob"] for e in there[0]["logprobs"]["content"]] == pytest.approx(
            [e["logprob"] for e in entries], abs=1e-3
        )


def test_forced_call_is_the_same_over_grpc(client, system):
    tool = pb.Tool(name="paint", parameters=PARAMETERS)
    choice = pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_NAMED, name="paint")
    request = grpc_request({"temperature": 0})
    request.tools.append(tool)
    request.tool_choice.CopyFrom(choice)
    pieces = [piece for d in over_grpc(system, request) for piece in d.tool_calls]
    body = chat_body({"temperature": 0}) | {
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "paint",
                    "parameters": {
                        "type": "object",
                        "properties": {"c": {"enum": ["red", "blue"]}},
                        "required": ["c"],
                    },
                },
            }
        ],
        "tool_choice": {"type": "function", "function": {"name": "paint"}},
    }
    (call,) = calls_of(stream(client, CHAT, body))
    assert pieces[0].name == call["name"]
    assert "".join(piece.arguments for piece in pieces) == call["arguments"]


def test_text_of_a_completion_is_the_same_over_grpc(client, system):
    body = {"prompt": "Once upon", "temperature": 0, "max_tokens": NUM_TOKENS}
    wanted = client.post(COMPLETIONS, json=body).json()["choices"][0]["text"]
    request = pb.CompletionRequest(
        text="Once upon",
        sampling=worker_pb2.SamplingParams(temperature=0, max_tokens=NUM_TOKENS),
    )
    with grpc.insecure_channel(f"127.0.0.1:{system.grpc_port}") as channel:
        deltas = list(inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=60))
    assert "".join(d.text for d in deltas) == wanted


def test_text_of_a_completion_is_the_same_over_open_inference(client, system):
    body = {"prompt": ["Once upon", "In the"], "temperature": 1, "seed": 3, "top_k": 20}
    body["max_tokens"] = NUM_TOKENS
    answer = client.post(COMPLETIONS, json=body).json()
    wanted = [choice["text"].encode() for choice in answer["choices"]]
    requests = []
    for prompts in (["Once upon", "In the"], ["Once upon"], ["In the"]):
        request = open_inference_pb2.ModelInferRequest(id=prompts[0])
        tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[len(prompts)])
        tensor.contents.bytes_contents.extend(prompt.encode() for prompt in prompts)
        request.parameters["temperature"].double_param = 1
        for name in ("seed", "top_k", "max_tokens"):
            request.parameters[name].int64_param = body[name]
        requests.append(request)
    for request in requests[1:]:
        request.parameters["stream"].bool_param = True
    with grpc.insecure_channel(f"127.0.0.1:{system.grpc_port}") as channel:
        stub = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        whole = stub.ModelInfer(requests[0], timeout=60)
        responses = list(stub.ModelStreamInfer(iter(requests[1:]), timeout=60))
    assert whole.outputs[0].contents.bytes_contents == wanted
    counts = [sum(t.contents.int_contents) for t in whole.outputs[2:4]]
    assert counts == [answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]]
    pieces = {"Once upon": b"", "In the": b""}
    for response in responses:
        assert not response.error_message
        found = response.infer_response
        pieces[found.id] += found.outputs[0].contents.bytes_contents[0]
    assert list(pieces.values()) == wanted
