"""The openai package: sync, async, streaming, raw. Prints what it got: openai_sdk.py URL MODEL."""

import asyncio
import json
import sys

import openai

url, model = sys.argv[1] + "/v1", sys.argv[2]
MESSAGES = [{"role": "user", "content": "Which city is the capital of France?"}]
ASKED = {"model": model, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
told = {}

client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
told["models"] = [card.id for card in client.models.list()]
answer = client.chat.completions.create(**ASKED, logprobs=True, top_logprobs=2)
told["text"] = answer.choices[0].message.content
told["usage"] = answer.usage.completion_tokens
told["logprobs"] = len(answer.choices[0].logprobs.content)
told["top_logprobs"] = [len(t.top_logprobs) for t in answer.choices[0].logprobs.content]

stream = client.chat.completions.create(
    **ASKED, stream=True, stream_options={"include_usage": True}
)
chunks = list(stream)
told["streamed"] = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
told["streamed_usage"] = chunks[-1].usage.completion_tokens

with client.chat.completions.stream(**ASKED) as events:
    told["events"] = events.get_final_completion().choices[0].message.content

raw = client.chat.completions.with_raw_response.create(
    **ASKED, extra_headers={"X-Request-Id": "mine-7"}
)
told["raw_id"] = raw.headers.get("x-request-id")
told["raw"] = raw.parse().choices[0].message.content
with client.chat.completions.with_streaming_response.create(**ASKED) as response:
    told["raw_streamed"] = response.parse().choices[0].message.content

completion = client.completions.create(
    model=model, prompt=["The sky is", "Grass is"], max_tokens=4, temperature=0
)
told["completions"] = [choice.index for choice in completion.choices]
told["seeded"] = [
    client.completions.create(model=model, prompt="Once", max_tokens=8, temperature=1, seed=5)
    .choices[0]
    .text
    for _ in range(2)
]


async def async_part() -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        answers = await asyncio.gather(*(client.chat.completions.create(**ASKED) for _ in range(4)))
        told["async"] = [answer.choices[0].message.content for answer in answers]
        text = ""
        async for chunk in await client.chat.completions.create(**ASKED, stream=True):
            text += chunk.choices[0].delta.content or ""
        told["async_streamed"] = text
        # A stream that is left must not hurt those after it.
        left = await client.chat.completions.create(**{**ASKED, "max_tokens": 200}, stream=True)
        async for _ in left:
            break
        await left.close()


asyncio.run(async_part())
for name, change in {
    "not_found": {"model": "nobody"},
    "bad_request": {"temperature": -1},
}.items():
    try:
        client.chat.completions.create(**{**ASKED, **change})
    except openai.APIStatusError as error:
        told[name] = [type(error).__name__, error.status_code, error.param, error.message]
json.dump(told, sys.stdout)
