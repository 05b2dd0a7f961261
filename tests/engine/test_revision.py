"""The operator's word in a worker's fingerprint."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.core.errors import ConfigError
from baton.engine.config import EngineConfig
from baton.engine.weights import load_model
from tiny_llama import write_checkpoint


def model_id(folder: Path, revision: str = "") -> str:
    return load_model(EngineConfig(folder, dtype="float32", revision=revision)).model_id


def test_weights_and_the_word_make_the_revision(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "first")
    again = write_checkpoint(tmp_path / "again")
    second = write_checkpoint(tmp_path / "second", seed=1)
    assert model_id(first) == model_id(again) != model_id(second)
    assert model_id(first, "b") == model_id(again, "b")
    made = {model_id(folder, word) for folder in (first, second) for word in ("", "a", "b")}
    assert len(made) == 6 and all(len(each) == 16 for each in made)


@pytest.mark.parametrize("revision", ["x" * 65, "two\nlines"])
def test_a_word_that_is_none_is_refused(revision: str) -> None:
    with pytest.raises(ConfigError, match="revision must have at most 64 printable characters"):
        EngineConfig(Path("/m"), revision=revision)
