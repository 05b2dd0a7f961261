"""`python -m services.decode`: the worker program with this pool's defaults."""

from __future__ import annotations

import sys

from baton.core.worker_info import Role
from services.decode.config import DEFAULTS
from services.worker.main import run

if __name__ == "__main__":
    sys.exit(run(Role.DECODE, DEFAULTS))
