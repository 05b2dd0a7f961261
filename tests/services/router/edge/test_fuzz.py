"""Any JSON body gets an answer below 500, and every refusal is a JSON error object."""

from __future__ import annotations

import asyncio

import httpx
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.telemetry.metrics import Metrics
from services.router.edge.http_app import HttpApp
from services.router.openai_api.schema import _NOT_SUPPORTED, ChatBody, CompletionBody

FIELDS = sorted(
    {*ChatBody.model_fields, *CompletionBody.model_fields, *_NOT_SUPPORTED} | {"unknown_field"}
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.integers(-3, 300)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.floats(-3, 3)
    | st.text(max_size=20)
    | st.sampled_from(["user", "tiny", "text", "json_object", "1"])
)
messages = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "system", "assistant", "tool"]) | scalars,
            "content": st.text(max_size=30)
            | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": scalars}))
            | scalars,
            "tool_calls": scalars,
        },
    ),
    max_size=3,
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=5) | st.sampled_from(["5", "type", "text"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
schemas = st.recursive(
    st.sampled_from([{"type": "string"}, {"type": "integer"}, {"const": 1}, {"enum": ["a"]}, {}])
    | values,
    lambda inner: (
        st.fixed_dictionaries(
            {"type": st.just("object"), "properties": st.dictionaries(st.text(max_size=4), inner)}
        )
        | st.fixed_dictionaries({"anyOf": st.lists(inner, max_size=3)})
    ),
    max_leaves=4,
)
functions = st.fixed_dictionaries(
    {"name": st.sampled_from(["f", "g"]) | scalars},
    optional={"parameters": schemas, "description": scalars, "strict": scalars},
)
tools = st.lists(
    st.fixed_dictionaries(
        {"type": st.just("function"), "function": functions}, optional={"x": values}
    ),
    max_size=3,
)
shaped = st.fixed_dictionaries(
    {"messages": st.just([{"role": "user", "content": "a"}]), "prompt": st.just([1, 2])},
    optional={
        "tools": tools,
        "tool_choice": st.sampled_from(["auto", "none", "required"])
        | st.just({"type": "function", "function": {"name": "f"}})
        | values,
        "parallel_tool_calls": st.booleans(),
        "response_format": st.fixed_dictionaries(
            {"type": st.sampled_from(["text", "json_object", "json_schema"])},
            optional={"json_schema": st.fixed_dictionaries({"schema": schemas}) | values},
        ),
        "structured_outputs": st.dictionaries(
            st.sampled_from(["json", "regex", "choice", "grammar", "json_object"]),
            schemas | st.text(max_size=8),
            max_size=2,
        ),
        "guided_regex": st.text(max_size=12),
        "guided_grammar": st.text(max_size=12),
        "chat_template_kwargs": st.dictionaries(
            st.sampled_from(["messages", "tools", "bos_token", "x"]), values, max_size=2
        ),
        "continue_final_message": st.booleans(),
        "add_generation_prompt": st.booleans(),
        "echo": st.booleans(),
        "logprobs": st.booleans() | st.integers(0, 3),
        "max_tokens": st.integers(0, 4),
        "stream": st.booleans(),
    },
)
plausible = st.fixed_dictionaries(
    {"messages": messages | values, "prompt": st.text(max_size=20) | values},
    optional={name: values for name in FIELDS if name not in ("messages", "prompt")},
)
sparse = st.fixed_dictionaries(
    {"messages": st.just([{"role": "user", "content": "a"}]), "prompt": st.just([1, 2])},
    optional={"stream": st.booleans(), "n": st.integers(1, 3), "unknown_field": values},
).flatmap(
    lambda body: st.dictionaries(st.sampled_from(FIELDS), values, max_size=2).map(
        lambda extra: {**body, **extra}
    )
)


@pytest.fixture
def post(generator, edge_config):
    """A synchronous caller of the application on a loop of its own, as hypothesis needs."""
    app = HttpApp(generator, metrics=Metrics(), config=edge_config)
    with asyncio.Runner() as runner:
        client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app),  # type: ignore[arg-type]
            base_url="http://edge",
        )
        yield lambda path, data: runner.run(_post(client, path, data))
        runner.run(client.aclose())
    app.close()


async def _post(client, path: str, data: bytes) -> httpx.Response:
    return await client.post(path, content=data, headers={"content-type": "application/json"})


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(body=sparse | shaped | plausible | values)
def test_any_json_is_answered(post, path, body):
    response = post(path, orjson.dumps(body))
    assert response.status_code < 500, response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] in ("invalid_request_error", "not_found_error")


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_answered(post, data):
    response = post("/v1/completions", data)
    assert response.status_code == 400
    assert response.json()["error"]["message"]
