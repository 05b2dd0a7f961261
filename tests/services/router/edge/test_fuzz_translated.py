"""Any JSON sent to the translated APIs gets an answer below 500, and every refusal is in shape."""

from __future__ import annotations

import asyncio

import httpx
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.telemetry.metrics import Metrics
from services.router.edge.http_app import HttpApp
from services.router.openai_api.messages.message_schema import MessagesBody
from services.router.openai_api.responses.response_schema import ResponsesBody

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
LIMITS = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ROLES = ["user", "assistant", "system", "tool"]
TEXTS = ["text", "input_text", "output_text", "refusal", "thinking", "reasoning", "message"]
CALLS = ["function_call", "function_call_output", "tool_use", "tool_result", "function", "f", "{}"]
CHOICES = ["auto", "any", "none", "required", "json_schema"]
words = st.sampled_from([*ROLES, *TEXTS, *CALLS, *CHOICES])
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.integers(-3, 300)
    | st.floats(-3, 3)
    | st.text(max_size=10)
    | words
)
FIELDS = ["type", "role", "content", "text", "name", "id", "format", "schema", "effort", "user_id"]
CALL_FIELDS = ["call_id", "arguments", "output", "input", "tool_use_id", "parameters"]
names = st.sampled_from([*FIELDS, *CALL_FIELDS, "input_schema"])
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=5),
    max_leaves=12,
)
parts = st.fixed_dictionaries(
    {"type": words, "text": st.text(max_size=5)},
    optional={"id": scalars, "name": words, "input": values, "tool_use_id": scalars,
              "content": values, "refusal": scalars},
)  # fmt: skip
items = st.fixed_dictionaries(
    {},
    optional={
        "type": words,
        "role": words,
        "content": st.text(max_size=9) | st.lists(parts, max_size=3) | values,
        "call_id": words,
        "name": words,
        "arguments": st.sampled_from(["{}", '{"a": 1}', "[]", "{"]) | values,
        "output": st.text(max_size=5) | st.lists(parts, max_size=2) | values,
    },
)
conversations = st.lists(items | values, max_size=4)


def bodies(cls, fixed):
    """Right in most fields, wrong in some."""
    fields = sorted(cls.model_fields)
    return st.tuples(
        st.fixed_dictionaries(fixed), st.dictionaries(st.sampled_from(fields), values, max_size=2)
    ).map(lambda both: {**both[0], **both[1]})


response_bodies = bodies(
    ResponsesBody, {"input": st.just("a") | conversations, "stream": st.booleans()}
)
message_bodies = bodies(
    MessagesBody,
    {
        "messages": st.just([{"role": "user", "content": "a"}]) | conversations,
        "max_tokens": st.integers(0, 5),
        "stream": st.booleans(),
    },
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
        yield lambda path, data: runner.run(client.post(path, content=data))
        runner.run(client.aclose())
    app.close()


@LIMITS
@given(body=response_bodies | values)
def test_any_body_of_a_response_is_answered(post, body):
    response = post(RESPONSES, orjson.dumps(body))
    # 429: of many that run in the background.
    assert response.status_code in (200, 400, 404, 429), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}


@LIMITS
@given(body=message_bodies | values)
def test_any_body_of_a_message_is_answered(post, body):
    for path in (MESSAGES, MESSAGES + "/count_tokens"):
        response = post(path, orjson.dumps(body))
        assert response.status_code in (200, 400, 404), response.text
        if response.status_code != 200:
            error = response.json()["error"]
            assert error.keys() == {"message", "type", "param"}
