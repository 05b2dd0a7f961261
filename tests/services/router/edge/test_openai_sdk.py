"""The openai package as clients use it, synchronous and asynchronous."""

from __future__ import annotations

import asyncio

import openai
import pytest

from baton.core.errors import DeadlineExceeded, NoWorker, Overloaded, WorkerLost

HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def sdk(edge):
    async with openai.AsyncOpenAI(
        base_url=f"{edge.url}/v1", api_key="none", max_retries=0, timeout=10
    ) as client:
        yield client


async def test_chat(sdk):
    answer = await sdk.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5)
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0


async def test_streamed_chat(sdk):
    text, usage, reasons = "", None, []
    stream = await sdk.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert (text, reasons, usage.completion_tokens) == ("Hello, world", ["stop"], 12)


async def test_stream_helper_assembles_the_message(sdk):
    async with sdk.chat.completions.stream(model="tiny", messages=HELLO) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "Hello, world"


async def test_logprobs(sdk):
    answer = await sdk.chat.completions.create(
        model="tiny", messages=HELLO, logprobs=True, top_logprobs=1
    )
    assert [e.token for e in answer.choices[0].logprobs.content] == list("Hello, world")


async def test_completions(sdk):
    answer = await sdk.completions.create(model="tiny", prompt=["a", "b"], logprobs=1)
    assert [c.text for c in answer.choices] == ["Hello, world"] * 2
    text = ""
    async for chunk in await sdk.completions.create(model="tiny", prompt=[1, 2], stream=True):
        text += chunk.choices[0].text
    assert text == "Hello, world"


async def test_models(sdk):
    assert [m.id async for m in sdk.models.list()] == ["tiny"]
    assert (await sdk.models.retrieve("tiny")).id == "tiny"


async def test_closing_a_stream_cancels(sdk, generator):
    generator.step_s = 0.02
    stream = await sdk.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    async for _ in stream:
        break
    await stream.close()
    await generator.until_idle(1, timeout_s=1)
    assert generator.closed_early


@pytest.mark.parametrize(
    ("fields", "cls"),
    [({"temperature": -1}, openai.BadRequestError), ({"model": "x"}, openai.NotFoundError)],
)
async def test_request_errors_have_their_class(sdk, fields, cls):
    with pytest.raises(cls) as caught:
        await sdk.chat.completions.create(**{"model": "tiny", "messages": HELLO, **fields})
    assert caught.value.body["message"]
    assert caught.value.param == next(iter(fields))


@pytest.mark.parametrize(
    ("error", "cls"),
    [
        (Overloaded("full", retry_after_s=4), openai.RateLimitError),
        (NoWorker("none"), openai.InternalServerError),
        (DeadlineExceeded("late"), openai.InternalServerError),
    ],
)
async def test_service_errors_have_their_class(sdk, generator, error, cls):
    generator.fail_at, generator.error = 0, error
    with pytest.raises(cls) as caught:
        await sdk.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    if isinstance(error, Overloaded):
        assert caught.value.response.headers["retry-after"] == "4"


async def test_error_in_a_stream_is_raised(sdk, generator):
    generator.fail_at, generator.error = 3, WorkerLost("the worker is gone")
    stream = await sdk.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError, match="the worker is gone"):
        async for _ in stream:
            pass


async def test_synchronous_client(edge):
    def use() -> tuple[str, str]:
        with openai.OpenAI(base_url=f"{edge.url}/v1", api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(model="tiny", messages=HELLO)
            stream = client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
            parts = [c.choices[0].delta.content or "" for c in stream]
            with pytest.raises(openai.NotFoundError):
                client.models.retrieve("none")
            return whole.choices[0].message.content, "".join(parts)

    assert await asyncio.to_thread(use) == ("Hello, world", "Hello, world")
