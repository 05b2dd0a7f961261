"""The object `response`: the same fields in every state of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from baton.core.errors import wire_status
from baton.core.request import SamplingParams
from services.router.openai_api.error_body import client_message
from services.router.openai_api.responses.response_schema import ResponsesBody
from services.router.openai_api.wire_format import Frame
from services.router.requests.generation import Usage

Object = dict[str, object]


class Status(Enum):
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    INCOMPLETE = "incomplete"
    """Cut off by a limit of tokens."""
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Envelope:
    """Of one request."""

    frame: Frame
    body: ResponsesBody
    sampling: SamplingParams

    def response(
        self,
        status: Status,
        output: Sequence[Object] = (),
        usage: Usage | None = None,
        *,
        completed_at_s: int | None = None,
        error: BaseException | None = None,
    ) -> Object:
        body, frame = self.body, self.frame
        is_cut = status is Status.INCOMPLETE
        return {
            "id": frame.response_id,
            "object": "response",
            "created_at": frame.created_s,
            "completed_at": completed_at_s,
            "status": status.value,
            "background": bool(body.background),
            "error": None if error is None else _error(error),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": frame.model,
            "output": list(output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {
                "effort": None if body.reasoning is None else body.reasoning.effort,
                "summary": None,
            },
            "service_tier": "default",
            "store": body.is_stored,
            "temperature": self.sampling.temperature,
            "text": {"format": self._format()},
            "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
            "tools": [_tool(tool.model_dump()) for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": self.sampling.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else usage_object(usage),
            "user": body.user,
        }

    def _format(self) -> Object:
        wanted = None if self.body.text is None else self.body.text.format
        if wanted is None:
            return {"type": "text"}
        return wanted.model_dump(by_alias=True, exclude_none=True)


def usage_object(usage: Usage) -> Object:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _tool(tool: Object) -> Object:
    return {**tool, "parameters": tool["parameters"] or {}, "strict": bool(tool["strict"])}


def _error(error: BaseException) -> Object:
    status = wire_status(error).http
    code = "server_error" if status >= 500 else "invalid_prompt"
    if status == 429:
        code = "rate_limit_exceeded"
    return {"code": code, "message": client_message(error)}
