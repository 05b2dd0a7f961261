"""Which pools may go on with a request that has begun. Pure.

Two revisions of a model can be served under one name, as they are during a roll-out. A pool holds
one revision, so a prompt never passes from one to the other. Here the rest of an answer is kept
with the revision whose tokens the client has: another one would go on with a text it did not write.

Does not know: how revisions are told apart (`KvLayout.model_id`), costs.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.core.errors import NoWorker
from services.router.placement.candidates import Pool


def pools_of_revision(pools: Sequence[Pool], model_id: str) -> tuple[Pool, ...]:
    """Those of `pools` with the weights of `model_id`, whatever their block size.

    Raises NoWorker where only other revisions take work.
    """
    kept = tuple(pool for pool in pools if pool.layout.model_id == model_id)
    if pools and not kept:
        raise NoWorker(
            f"the revision {model_id} of the model, which began this answer, takes no work any "
            "more; send the request again to have it answered by the one that is served now"
        )
    return kept
