"""The prefill pool as a Ray Serve deployment."""

from __future__ import annotations

from ray import serve

from services.prefill.config import DEFAULTS
from services.worker.deployment import SERVE_OPTIONS, WorkerReplica


class PrefillReplica(WorkerReplica):
    """One prefill worker a replica."""

    DEFAULTS = DEFAULTS


PrefillDeployment = serve.deployment(name="Prefill", **SERVE_OPTIONS)(PrefillReplica)
