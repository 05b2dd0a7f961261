"""Answers about API keys that this copy has heard.

Keys that exist and keys that do not are remembered apart, so that guesses push out no real ones.

Pure: time is passed in. Bounded.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from services.router.shared.state import TenantRecord

MAX_UNKNOWN = 10_000


class KeyAnswer(NamedTuple):
    record: TenantRecord | None
    heard_at_s: float


class KeyCache:
    """The last answer for each key, the least recently asked dropped first."""

    def __init__(self, max_known: int) -> None:
        self._known: OrderedDict[str, KeyAnswer] = OrderedDict()
        self._unknown: OrderedDict[str, KeyAnswer] = OrderedDict()
        self._max_known = max_known

    def get(self, key_hash: str, *, max_age_s: float, now_s: float) -> KeyAnswer | None:
        """The last answer unless it is older than `max_age_s`."""
        for answers in (self._known, self._unknown):
            answer = answers.get(key_hash)
            if answer is not None:
                answers.move_to_end(key_hash)
                return answer if now_s - answer.heard_at_s <= max_age_s else None
        return None

    def put(self, key_hash: str, record: TenantRecord | None, now_s: float) -> None:
        self._known.pop(key_hash, None)
        self._unknown.pop(key_hash, None)
        answers, limit = (
            (self._unknown, MAX_UNKNOWN) if record is None else (self._known, self._max_known)
        )
        answers[key_hash] = KeyAnswer(record, now_s)
        if len(answers) > limit:
            answers.popitem(last=False)
