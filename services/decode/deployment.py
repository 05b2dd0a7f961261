"""The decode pool as a Ray Serve deployment."""

from __future__ import annotations

from ray import serve

from services.decode.config import DEFAULTS
from services.worker.deployment import SERVE_OPTIONS, WorkerReplica


class DecodeReplica(WorkerReplica):
    """One decode worker a replica."""

    DEFAULTS = DEFAULTS


DecodeDeployment = serve.deployment(name="Decode", **SERVE_OPTIONS)(DecodeReplica)
