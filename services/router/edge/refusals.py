"""What a client is told when admission sends its request away."""

from __future__ import annotations

from services.router.admission.ticket import Refusal, Ticket


def refusal_message(ticket: Ticket) -> str:
    """Why, and what may help."""
    retry = f"try again in {ticket.retry_after_s:.1f} s"
    name, targets = ticket.slo_class, ticket.targets
    match ticket.refusal:
        case Refusal.TTFT:
            return (
                f"the platform is busy: the first token is predicted after "
                f"{ticket.predicted_ttft_s or 0.0:.2f} s, SLO class {name} takes at most "
                f"{targets.ttft_s or 0.0:g} s; {retry}, or use a class with more time"
            )
        case Refusal.ITL:
            return (
                f"the platform is busy: tokens are predicted every "
                f"{1000 * (ticket.predicted_itl_s or 0.0):.0f} ms, and no faster batch came free "
                f"in the time of SLO class {name}; {retry}"
            )
        case Refusal.LATE:
            return (
                f"the platform is busy: the request waited, and its first token can no longer come "
                f"within the {targets.ttft_s or 0.0:g} s of SLO class {name}; {retry}"
            )
        case Refusal.PUSHED_OUT:
            return f"the queue is full and most of it is yours; {retry}"
    return f"the queue is full; {retry}"
