"""What a text model is in the Open Inference Protocol: its tensors, its parameters, and requests as
the bodies that the completions route parses, so that both mean the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from baton.core.errors import InvalidRequest, ModelNotFound
from baton.rpc.v1 import open_inference_pb2 as pb
from services.router.edge.open_inference_tensors import Tensor, Value, read_tensors
from services.router.edge.preprocess import shorten
from services.router.openai_api.schema import CompletionBody, validate

VERSION = "1"
PLATFORM = "baton"

# Name -> datatype; every one has one dimension of any size.
INPUTS = {
    "text_input": "BYTES",
    "input_ids": "INT32",
    "stream": "BOOL",
    "sampling_parameters": "BYTES",
}
OUTPUTS = {
    "text_output": "BYTES",
    "finish_reason": "BYTES",
    "prompt_tokens": "INT32",
    "completion_tokens": "INT32",
    "cached_tokens": "INT32",
}
_INTEGERS = ("INT32", "INT64", "UINT32", "UINT64")

# Fields of completions that have no place in these tensors, or are told in another way.
_NOT_TAKEN = {
    "model",
    "prompt",
    "stream_options",
    "baton",
    "logprobs",
    "prompt_logprobs",
    "echo",
    "best_of",
    "return_token_ids",
    "return_tokens_as_token_ids",
}
FIELDS = frozenset(CompletionBody.model_fields) - _NOT_TAKEN

# Parameters of Triton's clients, and the values under which they change nothing here.
_TRITON = {
    "triton_enable_empty_final_response": (False, True),
    "binary_data_output": (False, True),
    "sequence_id": (0, ""),
    "sequence_start": (False,),
    "sequence_end": (False,),
}
_S_PER_US = 1e-6


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A request as it was understood."""

    body: CompletionBody
    outputs: Sequence[str]
    is_raw: bool
    """Its tensors were raw, so those of its responses are."""
    timeout_s: float | None
    """What the request itself leaves for an answer."""


def read_request(request: pb.ModelInferRequest) -> InferRequest:
    """Raises InvalidRequest, ModelNotFound."""
    check_version(request.model_name, request.model_version)
    outputs = _wanted_outputs(request)
    tensors = read_tensors(request)
    fields: dict[str, object] = {"model": request.model_name}
    fields["prompt"] = _prompt(tensors)
    timeout_s = None
    for name, parameter in request.parameters.items():
        value = _parameter(name, parameter)
        if name == "timeout":
            timeout_s = _timeout_s(value)
        elif name == "sampling_parameters":
            _add(fields, _json_fields(value))
        elif name not in _TRITON:
            _add(fields, {name: value})
        elif value not in _TRITON[name]:
            raise InvalidRequest(
                f"{name} is not supported: requests are not parts of a sequence; leave it out",
                param=name,
            )
    if sampling := tensors.get("sampling_parameters"):
        _add(fields, _json_fields(_single(sampling, sampling.texts())))
    if stream := tensors.get("stream"):
        if stream.datatype != "BOOL":
            raise stream.wrong("BOOL")
        _add(fields, {"stream": _single(stream, stream.values)})
    return InferRequest(
        validate(fields, CompletionBody), outputs, bool(request.raw_input_contents), timeout_s
    )


def check_version(name: str, version: str) -> None:
    """Raises ModelNotFound."""
    if version not in ("", VERSION):
        raise ModelNotFound(
            f"model {shorten(name)} has no version {shorten(version)}; it has {VERSION}",
            param="model_version",
        )


def model_metadata(name: str) -> pb.ModelMetadataResponse:
    tensor = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=name,
        versions=[VERSION],
        platform=PLATFORM,
        inputs=[tensor(name=n, datatype=d, shape=[-1]) for n, d in INPUTS.items()],
        outputs=[tensor(name=n, datatype=d, shape=[-1]) for n, d in OUTPUTS.items()],
    )


def _wanted_outputs(request: pb.ModelInferRequest) -> Sequence[str]:
    for output in request.outputs:
        if output.name not in OUTPUTS:
            raise InvalidRequest(
                f"there is no output {shorten(output.name)}; there are {', '.join(OUTPUTS)}",
                param="outputs",
            )
    # Asked for twice, it comes once.
    return list(dict.fromkeys(o.name for o in request.outputs)) or tuple(OUTPUTS)


def _prompt(tensors: dict[str, Tensor]) -> object:
    for name in tensors:
        if name not in INPUTS:
            raise InvalidRequest(
                f"there is no input {shorten(name)}; there are {', '.join(INPUTS)}", param="inputs"
            )
    text, ids = tensors.get("text_input"), tensors.get("input_ids")
    if (text is None) == (ids is None):
        raise InvalidRequest("send one of the inputs text_input and input_ids", param="inputs")
    if text is not None:
        texts = text.texts()
        if not texts:
            raise InvalidRequest("text_input has no element; send a text", param="text_input")
        return texts[0] if len(texts) == 1 else texts
    assert ids is not None
    if ids.datatype not in _INTEGERS:
        raise ids.wrong(" or ".join(_INTEGERS))
    return list(ids.values)


def _parameter(name: str, parameter: pb.InferParameter) -> object:
    kind = parameter.WhichOneof("parameter_choice")
    if kind is None:
        raise InvalidRequest(f"parameter {shorten(name)} has no value", param=name)
    value: object = getattr(parameter, kind)
    return value


def _add(fields: dict[str, object], more: dict[str, object]) -> None:
    for name, value in more.items():
        if name not in FIELDS:
            raise InvalidRequest(
                f"there is no parameter {shorten(name)}; there are {', '.join(sorted(FIELDS))}",
                param=shorten(name),
            )
        if name in fields:
            raise InvalidRequest(f"{name} is given twice; give it once", param=name)
        fields[name] = value


def _json_fields(value: object) -> dict[str, object]:
    """Raises InvalidRequest unless `value` is text with a JSON object."""
    where = "sampling_parameters"
    try:
        found = orjson.loads(value) if isinstance(value, str) else None
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"{where} is not valid JSON: {error}", param=where) from None
    if not isinstance(found, dict):
        raise InvalidRequest(f"{where} must be the text of a JSON object", param=where)
    return found


def _timeout_s(value: object) -> float | None:
    """Triton's clients send microseconds; 0 is none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidRequest(
            "timeout must be an integer of microseconds, 0 or more", param="timeout"
        )
    return value * _S_PER_US if value else None


def _single(tensor: Tensor, values: Sequence[Value | str]) -> Value | str:
    if len(values) != 1:
        raise InvalidRequest(
            f"{tensor.name} must have one element, got {len(values)}", param=tensor.name
        )
    return values[0]
