"""What the text of an answer must look like: a schema, a pattern, a list of choices, a grammar.

A value that crosses every border as it is. Not known here: what its text means, which library reads
it, tokens; see `baton.engine.grammar`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from baton.core.errors import InvalidRequest

MAX_STRUCTURED_BYTES = 128 << 10
"""UTF-8 bytes of a specification's text."""
MAX_CHOICES = 1024


class StructuredKind(Enum):
    JSON_SCHEMA = "json_schema"
    """`text` is a JSON Schema."""
    JSON_OBJECT = "json_object"
    """Any JSON object; `text` is empty."""
    REGEX = "regex"
    """`text` is a regular expression that the whole answer matches."""
    CHOICE = "choice"
    """`text` is a JSON array of strings, one of which is the answer; see `of_choices`."""
    GRAMMAR = "grammar"
    """`text` is a Lark grammar with a rule `start`, or one in GBNF with a rule `root`."""


@dataclass(frozen=True, slots=True)
class StructuredSpec:
    """Raises InvalidRequest for a text that is missing, superfluous or too long."""

    kind: StructuredKind
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind is StructuredKind.JSON_OBJECT:
            if self.text:
                raise InvalidRequest(
                    "structured output json_object takes no text; send a json_schema for more",
                    param="structured",
                )
            return
        if not self.text:
            raise InvalidRequest(
                f"structured output {self.kind.value} needs a text, got none", param="structured"
            )
        num_bytes = _num_bytes(self.text)
        if num_bytes > MAX_STRUCTURED_BYTES:
            raise InvalidRequest(
                f"structured output {self.kind.value} takes at most {MAX_STRUCTURED_BYTES} bytes, "
                f"got {num_bytes}; send a shorter one",
                param="structured",
            )

    @classmethod
    def of_choices(cls, choices: Sequence[str]) -> StructuredSpec:
        """Raises InvalidRequest for none, too many, or an empty one."""
        if not 1 <= len(choices) <= MAX_CHOICES:
            raise InvalidRequest(
                f"choice takes 1 to {MAX_CHOICES} entries, got {len(choices)}", param="structured"
            )
        if not all(choices):
            raise InvalidRequest(
                "choice has an empty entry; every entry needs at least one character",
                param="structured",
            )
        return cls(StructuredKind.CHOICE, json.dumps(list(choices), ensure_ascii=False))

    @property
    def choices(self) -> tuple[str, ...]:
        """Of kind CHOICE. Raises InvalidRequest for a text that `of_choices` does not write."""
        try:
            entries = json.loads(self.text)
        except (ValueError, RecursionError):
            entries = None
        if not isinstance(entries, list) or not all(isinstance(e, str) for e in entries):
            raise InvalidRequest("choice must be a JSON array of strings", param="structured")
        # The checks are those of a fresh one.
        StructuredSpec.of_choices(entries)
        return tuple(entries)


def _num_bytes(text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"structured output is not valid Unicode: unpaired surrogate at character "
            f"{error.start}; send UTF-8 text",
            param="structured",
        ) from error
