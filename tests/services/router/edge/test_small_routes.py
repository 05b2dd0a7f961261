"""Tokenize, detokenize, ping, load, the API's document."""

from __future__ import annotations

import jsonschema
import pytest

from services.router.openai_api.openapi import ROUTES

HELLO = [{"role": "user", "content": "hi"}]


async def test_tokenize_and_back(direct, tokenizer):
    answer = (await direct.post("/tokenize", json={"model": "tiny", "prompt": "héllo"})).json()
    assert answer["tokens"] == tokenizer.encode("héllo", add_special_tokens=True)
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 256
    assert answer["token_strs"] is None
    text = (await direct.post("/detokenize", json={"tokens": answer["tokens"][1:]})).json()
    assert text == {"prompt": "héllo"}


async def test_tokenize_options(direct):
    body = {"prompt": "ab", "add_special_tokens": False, "return_token_strs": True}
    assert (await direct.post("/tokenize", json=body)).json()["token_strs"] == ["a", "b"]
    assert (await direct.post("/tokenize", json={"prompt": ""})).json()["count"] == 0


async def test_tokenized_conversation_is_the_prompt_of_the_chat_route(direct, generator):
    answer = (await direct.post("/tokenize", json={"messages": HELLO})).json()
    await direct.post("/v1/chat/completions", json={"messages": HELLO})
    assert tuple(answer["tokens"]) == generator.started[0].prompt_token_ids


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
        ("/detokenize", {"tokens": [1, "a"]}, "tokens"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
    ],
)
async def test_bad_bodies_name_the_field(direct, path, body, param):
    response = await direct.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_unknown_model(direct):
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert (await direct.post(path, json={"model": "x", **body})).status_code == 404


async def test_ping_is_health(direct, generator):
    for call in (direct.get, direct.post):
        assert (await call("/ping")).json()["status"] == "ok"
    generator.is_ready = False
    assert (await direct.get("/ping")).status_code == 503


async def test_load_counts_what_runs(direct):
    assert (await direct.get("/load")).json() == {"server_load": 0}


async def test_reset_of_the_prefix_cache_is_cleanly_refused(direct):
    response = await direct.post("/reset_prefix_cache")
    assert response.status_code == 501
    assert response.json()["error"]["type"] == "not_implemented_error"


async def test_embeddings_of_a_model_that_generates_are_cleanly_refused(direct):
    response = await direct.post("/v1/embeddings", json={"model": "tiny", "input": "a"})
    assert response.status_code == 501
    error = response.json()["error"]
    assert error["type"] == "not_implemented_error" and "embeddings" in error["message"]
    assert (await direct.get("/v1/embeddings")).status_code == 405


BODIES = {
    "/v1/chat/completions": {"messages": HELLO, "logprobs": True, "return_token_ids": True},
    "/v1/completions": {"prompt": "a", "logprobs": 1, "return_token_ids": True},
    "/v1/responses": {"input": "a", "include": ["message.output_text.logprobs"]},
    "/v1/messages": {"messages": HELLO, "max_tokens": 5},
    "/v1/messages/count_tokens": {"messages": HELLO},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
    "/ping": {},
    "/reset_prefix_cache": {},
    "/v1/embeddings": {"input": "a"},
}


async def test_document_describes_what_is_there(direct):
    document = (await direct.get("/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    for route in ROUTES:
        path = route.path.replace("{id}", "tiny")
        body = None if route.method == "get" else BODIES.get(path)
        response = await direct.request(route.method, path, json=body)
        operation = document["paths"][route.path][route.method]
        described = operation["responses"][str(response.status_code)]["content"]
        schema = described.get("application/json", {}).get("schema")
        if schema is not None:
            jsonschema.validate(response.json(), {**schema, "components": document["components"]})
        if route.body is not None:
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            whole = {**schema, "components": document["components"]}
            jsonschema.validate(BODIES[path], whole)


async def test_document_has_every_field_that_is_parsed(direct):
    schemas = (await direct.get("/openapi.json")).json()["components"]["schemas"]
    chat = schemas["ChatBody"]["properties"]
    assert {"messages", "tools", "tool_choice", "response_format", "structured_outputs"} <= set(
        chat
    )
    assert "schema" in schemas["JsonSchemaFormat"]["properties"]
    assert {"prompt", "echo", "suffix"} - set(schemas["CompletionBody"]["properties"]) == {"suffix"}
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
