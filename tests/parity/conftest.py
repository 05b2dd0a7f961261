"""The oracle (transformers), tiny checkpoints, and sequences stepped by hand.

Helper files are loaded by path: tests are no package.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# Read by the OpenMP runtime when torch is first imported. Threads that wait by spinning slow each
# other down a hundredfold as soon as another process wants the same cores.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

SUPPORT = Path(__file__).parents[1] / "support"
GOLDEN = Path(__file__).with_name("golden") / "smollm2_135m_instruct_greedy.json"


def _load(name: str) -> ModuleType:
    qualified = f"parity_{name}"
    if qualified not in sys.modules:
        spec = importlib.util.spec_from_file_location(qualified, SUPPORT / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[qualified] = module
        spec.loader.exec_module(module)
    return sys.modules[qualified]


TINY_LLAMA = _load("tiny_llama")


@pytest.fixture(scope="session")
def make_harness() -> Callable[..., Any]:
    return _load("model_harness").ModelHarness


@pytest.fixture(scope="session", params=sorted(TINY_LLAMA.SHAPES))
def tiny_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint per shape."""
    folder = tmp_path_factory.mktemp(request.param)
    return TINY_LLAMA.write_checkpoint(folder, **TINY_LLAMA.SHAPES[request.param])


@pytest.fixture(scope="session")
def deferred_runner() -> ModuleType:
    """The module with DeferredRunner."""
    return _load("deferred_runner")


@pytest.fixture(scope="session")
def golden_items() -> list[dict[str, Any]]:
    return json.loads(GOLDEN.read_text())["items"]


@pytest.fixture(scope="session")
def smollm2(smollm2_float32_dir: Path, make_harness: Callable[..., Any]) -> Any:
    """The real model in float32 with room for all golden prompts at once."""
    return make_harness(smollm2_float32_dir, num_blocks=320)
