"""A run as one JSON object. Seconds, tokens, and shares from 0 to 1; keys say which."""

from __future__ import annotations

import dataclasses

from baton.loadtest.figures import meets
from baton.loadtest.options import Targets
from baton.loadtest.outcome import Outcome
from baton.loadtest.result import LoadResult

VERSION = 1


def json_report(result: LoadResult, *, has_requests: bool = False) -> dict[str, object]:
    """`has_requests`: with a row for each of them."""
    figures = result.figures
    report: dict[str, object] = {
        "version": VERSION,
        "started_at": result.started_at,
        "place": result.place,
        "model": result.model,
        "setup": dict(result.setup),
        "targets": dataclasses.asdict(result.targets),
        "is_kept": result.is_kept,
        "is_stopped": result.is_stopped,
        "figures": {**dataclasses.asdict(figures), "cached_share": figures.cached_share},
        "generator": dataclasses.asdict(result.generator),
        "timeline": dataclasses.asdict(result.timeline),
    }
    if has_requests:
        report["requests"] = [_row(o, result.targets) for o in result.outcomes]
    return report


def _row(outcome: Outcome, targets: Targets) -> dict[str, object]:
    return {
        "number": outcome.number,
        "turn": outcome.turn,
        "planned_s": outcome.planned_s,
        "sent_s": outcome.sent_s,
        "ended_s": outcome.ended_s,
        "ttft_s": outcome.ttft_s,
        "itl_s": outcome.itl_s,
        "e2e_s": outcome.e2e_s,
        "prompt_tokens": outcome.num_prompt_tokens,
        "cached_tokens": outcome.num_cached_tokens,
        "output_tokens": outcome.num_tokens,
        "asked_tokens": outcome.num_asked_tokens,
        "finish_reason": outcome.finish_reason,
        "is_good": all(meets(outcome, targets)),
        "error": None if outcome.error is None else outcome.error.label,
        "message": "" if outcome.error is None else outcome.error.message,
    }
