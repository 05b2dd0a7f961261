"""What POST /v1/responses and POST /v1/messages answer, for the API's document."""

from __future__ import annotations

from services.router.openai_api.json_schema import (
    INTEGER,
    NULLABLE_STRING,
    REF,
    STRING,
    Schema,
    array_of,
    object_of,
)
from services.router.openai_api.responses.envelope import Status

DIALECT_ANSWERS: dict[str, Schema] = {
    "ResponseUsage": object_of(
        {
            "input_tokens": INTEGER,
            "input_tokens_details": object_of({"cached_tokens": INTEGER}),
            "output_tokens": INTEGER,
            "output_tokens_details": object_of({"reasoning_tokens": INTEGER}),
            "total_tokens": INTEGER,
        }
    ),
    "OutputText": object_of(
        {
            "type": {"const": "output_text"},
            "text": STRING,
            "annotations": {"type": "array"},
            "logprobs": {"type": "array"},
        }
    ),
    "OutputItem": object_of(
        {
            "type": {"enum": ["message", "function_call"]},
            "id": STRING,
            "status": {"enum": ["in_progress", "completed", "incomplete"]},
            "role": {"const": "assistant"},
            "content": array_of("OutputText"),
            "call_id": STRING,
            "name": STRING,
            "arguments": STRING,
        },
        "role",
        "content",
        "call_id",
        "name",
        "arguments",
    ),
    "ResponseAnswer": object_of(
        {
            "id": STRING,
            "object": {"const": "response"},
            "created_at": INTEGER,
            "completed_at": {"type": ["integer", "null"]},
            "status": {"enum": [status.value for status in Status]},
            "background": {"type": "boolean"},
            "error": {"anyOf": [object_of({"code": STRING, "message": STRING}), {"type": "null"}]},
            "incomplete_details": {"type": ["object", "null"]},
            "instructions": NULLABLE_STRING,
            "metadata": {"type": "object"},
            "model": STRING,
            "output": array_of("OutputItem"),
            "previous_response_id": NULLABLE_STRING,
            "store": {"type": "boolean"},
            "usage": {"anyOf": [{"$ref": REF + "ResponseUsage"}, {"type": "null"}]},
        }
    ),
    "ResponseDeleted": object_of(
        {"id": STRING, "object": {"const": "response"}, "deleted": {"const": True}}
    ),
    "ContentBlock": object_of(
        {
            "type": {"enum": ["text", "tool_use"]},
            "text": STRING,
            "id": STRING,
            "name": STRING,
            "input": {"type": "object"},
        },
        "text",
        "id",
        "name",
        "input",
    ),
    "MessageAnswer": object_of(
        {
            "id": STRING,
            "type": {"const": "message"},
            "role": {"const": "assistant"},
            "model": STRING,
            "content": array_of("ContentBlock"),
            "stop_reason": {"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
            "stop_sequence": NULLABLE_STRING,
            "usage": object_of(
                {
                    "input_tokens": INTEGER,
                    "cache_read_input_tokens": INTEGER,
                    "cache_creation_input_tokens": INTEGER,
                    "output_tokens": INTEGER,
                }
            ),
        }
    ),
    "InputTokens": object_of({"input_tokens": INTEGER}),
    "MessageError": object_of(
        {
            "type": {"const": "error"},
            "error": object_of({"type": STRING, "message": STRING, "param": NULLABLE_STRING}),
        }
    ),
}
"""Of what is answered."""
