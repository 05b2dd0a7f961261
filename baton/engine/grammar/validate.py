"""The router's question about a specification: can it be compiled at all, and in bounded time?

Not known here: models. No torch.
"""

from __future__ import annotations

from baton.core.structured import StructuredSpec
from baton.engine.grammar.check import validate_aside
from baton.engine.grammar.spec import is_costly, validate_in_process


def validate_structured(spec: StructuredSpec) -> None:
    """Raises InvalidRequest with the reason, in one line.

    Takes a millisecond; for specifications that combine patterns, the start of a process and at
    most `check.CHECK_TIMEOUT_S`. Call it on a thread, and remember the answer.
    """
    if is_costly(spec):
        validate_aside(spec)
    else:
        validate_in_process(spec)
