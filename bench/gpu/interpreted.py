"""Kernels under Triton's interpreter, for checking benchmarks where there is no GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interpreted() -> Iterator[None]:
    """Triton interprets kernels from here on, unless it was imported to compile them: then
    launchers given tensors in the CPU's memory compute their references.
    """
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    import pytest

    from tests.support.triton_interpreter import complete_interpreter

    with pytest.MonkeyPatch.context() as patch:
        complete_interpreter(patch)
        yield
