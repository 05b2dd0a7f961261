"""The litellm package as a client: litellm_sdk.py URL MODEL."""

import asyncio
import json
import sys

import litellm

url, model = sys.argv[1] + "/v1", "openai/" + sys.argv[2]
ASKED = {
    "model": model,
    "api_base": url,
    "api_key": "none",
    "messages": [{"role": "user", "content": "Which city is the capital of France?"}],
    "max_tokens": 12,
    "temperature": 0,
}
told = {}
answer = litellm.completion(**ASKED)
told["text"] = answer.choices[0].message.content
told["usage"] = answer.usage.completion_tokens
told["streamed"] = "".join(
    chunk.choices[0].delta.content or "" for chunk in litellm.completion(**ASKED, stream=True)
)
told["async"] = asyncio.run(litellm.acompletion(**ASKED)).choices[0].message.content
try:
    litellm.completion(**{**ASKED, "temperature": -1}, num_retries=0)
except litellm.BadRequestError as error:
    told["bad_request"] = error.status_code
json.dump(told, sys.stdout)
