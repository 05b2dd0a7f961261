"""How the tensor library's threads wait for each other. To be set before torch is imported.

A step is a few hundred short parallel regions. OpenMP threads that find their partner late spin
for milliseconds by default; as soon as two workers share the cores, each spins on the core that
the other's partner needs, and both become tens of times slower. Spinning for a short while
and then sleeping keeps nearly all of the speed on idle cores and shares busy ones fairly.
"""

from __future__ import annotations

import os
import sys

SPIN_COUNT = "10000"
"""About a hundred microseconds: longer than the worker's own event loop or the router usually keeps
a thread from its core. Ten times less costs a tenth of a single stream's decode speed."""


def limit_spinning() -> bool:
    """Returns False when torch is already loaded or the user's environment decides otherwise.

    OpenMP takes this setting from the environment alone, at the moment it is loaded.
    """
    if "torch" in sys.modules or "OMP_WAIT_POLICY" in os.environ:
        return False
    return os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT) == SPIN_COUNT
