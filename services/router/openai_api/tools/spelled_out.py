"""Tools in plain words, for models whose chat template says nothing of them.

Definitions go into the system message, calls and results into tags inside ordinary messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from services.router.openai_api.tools.hermes import CLOSE, OPEN

Message = Mapping[str, object]


def spelled_out(
    messages: Sequence[Message], tools: Sequence[Mapping[str, object]]
) -> list[Message]:
    """The conversation with plain messages alone."""
    plain: list[Message] = [_plain(message) for message in messages]
    if not tools:
        return plain
    words = _definitions(tools)
    if plain and plain[0]["role"] == "system":
        head = {**plain[0], "content": f"{plain[0]['content']}\n\n{words}"}
        return [head, *plain[1:]]
    return [{"role": "system", "content": words}, *plain]


def _definitions(tools: Sequence[Mapping[str, object]]) -> str:
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return (
        f"You can call these functions:\n<tools>\n{lines}\n</tools>\n"
        f'To call one, write\n{OPEN}\n{{"name": NAME, "arguments": {{...}}}}\n{CLOSE}\n'
        "and wait for its result."
    )


def _plain(message: Message) -> Message:
    if message["role"] == "tool":
        text = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": text}
    calls = message.get("tool_calls")
    if not isinstance(calls, Sequence) or not calls:
        return {"role": message["role"], "content": message["content"]}
    written = [
        f"{OPEN}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CLOSE}" for call in calls
    ]
    parts = [str(message["content"])] if message["content"] else []
    return {"role": message["role"], "content": "\n".join([*parts, *written])}
