"""Triton's gRPC client in a process of its own: its generated messages have the protocol's names,
as ours have, and one process can know each name once.

Usage: triton_child.py HOST:PORT TEXT; prints one JSON object.
"""

from __future__ import annotations

import json
import queue
import sys

import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2

MODEL = "tiny"
TIMEOUT_S = 20


def main(address: str, text: str) -> dict[str, object]:
    prompt = triton.InferInput("text_input", [1], "BYTES")
    prompt.set_data_from_numpy(np.array([text.encode()], dtype=object))
    client = triton.InferenceServerClient(address)
    parameters = {"temperature": 0, "max_tokens": 64}
    result = client.infer(MODEL, [prompt], request_id="r", parameters=parameters)
    try:
        client.infer(MODEL, [prompt], parameters={"top_p": 7.0})
        refusal = ""
    except triton.InferenceServerException as error:
        refusal = f"{error.status()}: {error.message()}"
    answer = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(MODEL),
        "platform": client.get_model_metadata(MODEL, as_json=True)["platform"],
        "server": client.get_server_metadata(as_json=True)["name"],
        "text": result.as_numpy("text_output")[0].decode(),
        "finish_reason": result.as_numpy("finish_reason")[0].decode(),
        "completion_tokens": int(result.as_numpy("completion_tokens")[0]),
        "refusal": refusal,
        "pieces": streamed(client, prompt),
        "numbers": numbers(),
    }
    client.close()
    return answer


def streamed(client: triton.InferenceServerClient, prompt: triton.InferInput) -> list[str]:
    got: queue.Queue[tuple[triton.InferResult, Exception]] = queue.Queue()
    client.start_stream(lambda result, error: got.put((result, error)))
    client.async_stream_infer(
        MODEL, [prompt], enable_empty_final_response=True, parameters={"stream": True}
    )
    pieces = []
    while True:
        result, error = got.get(timeout=TIMEOUT_S)
        if error is not None:
            raise error
        pieces.append(result.as_numpy("text_output")[0].decode())
        if result.get_response().parameters["triton_final_response"].bool_param:
            break
    client.stop_stream()
    return pieces


def numbers() -> dict[str, dict[str, int]]:
    """Of every field of every message, as this client knows them."""
    known = {}
    for message in service_pb2.DESCRIPTOR.message_types_by_name.values():
        for part in (message, *message.nested_types):
            name = part.full_name.removeprefix("inference.")
            known[name] = {field.name: field.number for field in part.fields}
    return known


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
