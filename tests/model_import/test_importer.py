"""GGUF to Hugging Face folder: values, files, and what happens when it is repeated or fails."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from baton.core.errors import ConfigError, DeadlineExceeded
from baton.engine.tokenizer import Tokenizer
from baton.model_import import importer
from baton.model_import.cache import default_cache_dir, exclusive, model_dir
from baton.model_import.importer import ImportResult, import_gguf
from baton.model_import.progress import SilentProgress, Unit

MakeTiny = Callable[..., Any]
GOLDEN_FILE = Path(__file__).parents[1] / "parity/golden/smollm2_135m_instruct_greedy.json"


class RecordingProgress(SilentProgress):
    def __init__(self) -> None:
        self.stages: list[tuple[str, int | None, int]] = []

    def start_stage(self, description: str, total: int | None, unit: Unit) -> None:
        self.stages.append((description, total, 0))

    def update(self, completed: int) -> None:
        description, total, _ = self.stages[-1]
        self.stages[-1] = (description, total, completed)


def files_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("is_tied", [True, False])
def test_tensors_survive_the_round_trip(tmp_path: Path, make_tiny: MakeTiny, is_tied: bool) -> None:
    tiny = make_tiny(is_tied=is_tied)
    result = import_gguf(tiny.write(tmp_path / "in.gguf"), output=tmp_path / "out", dtype="float32")
    tensors = load_file(result.folder / "model.safetensors")
    assert tensors.keys() == tiny.tensors.keys()
    for name, values in tiny.tensors.items():
        np.testing.assert_array_equal(tensors[name], values, err_msg=name)
    assert json.loads((result.folder / "config.json").read_text())["tie_word_embeddings"] is is_tied


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_quantised_tensors_are_expanded(tmp_path: Path, make_tiny: MakeTiny, kind: str) -> None:
    quantised = gguf.GGMLQuantizationType[kind]
    tiny = make_tiny(quantised=quantised)
    folder = import_gguf(
        tiny.write(tmp_path / "in.gguf"), output=tmp_path / "out", dtype="float32"
    ).folder
    name = "model.layers.1.mlp.down_proj.weight"
    stored = gguf.quants.quantize(tiny.tensors[name], quantised)
    expected = gguf.quants.dequantize(stored, quantised)
    np.testing.assert_array_equal(load_file(folder / "model.safetensors")[name], expected)


def test_folder_holds_what_a_hugging_face_reader_expects(tmp_path: Path, tiny_gguf: Path) -> None:
    folder = import_gguf(tiny_gguf, output=tmp_path / "out").folder
    assert files_in(folder) == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "model.safetensors", "baton_import.json",
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 260,
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16",
        "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip


def test_tokenizer_is_rebuilt(tmp_path: Path, make_tiny: MakeTiny) -> None:
    path = make_tiny(adds_bos=True).write(tmp_path / "in.gguf")
    tokenizer = Tokenizer.from_folder(import_gguf(path, output=tmp_path / "out").folder)
    pieces = [
        tokenizer.token_text(i) for i in tokenizer.encode("he 12<user>", add_special_tokens=False)
    ]
    assert pieces == ["he", " ", "1", "2", "<user>"]
    assert tokenizer.encode("1", add_special_tokens=True)[0] == 0
    assert (
        tokenizer.decode(tokenizer.encode("<bos>hé<user>", add_special_tokens=False)) == "hé<user>"
    )
    assert tokenizer.eos_token_ids == (1,)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}]) == "x"


def test_second_import_only_looks(tmp_path: Path, tiny_gguf: Path) -> None:
    first = import_gguf(tiny_gguf, output=tmp_path / "out")
    progress = RecordingProgress()
    second = import_gguf(tiny_gguf, output=tmp_path / "out", progress=progress)
    assert (first.is_new, second.is_new) == (True, False)
    assert progress.stages == []


def test_progress_counts_every_tensor(tmp_path: Path, tiny_gguf: Path) -> None:
    progress = RecordingProgress()
    import_gguf(tiny_gguf, output=tmp_path / "out", progress=progress)
    assert progress.stages == [("convert to bfloat16", 20, 20)]


def test_other_dtype_replaces_an_import(tmp_path: Path, tiny_gguf: Path) -> None:
    import_gguf(tiny_gguf, output=tmp_path / "out", dtype="bfloat16")
    assert import_gguf(tiny_gguf, output=tmp_path / "out", dtype="float32").is_new
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "float32"


def test_foreign_folder_is_not_touched(tmp_path: Path, tiny_gguf: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not an imported model"):
        import_gguf(tiny_gguf, output=output)
    assert files_in(output) == {"thesis.txt"}


def test_failed_import_leaves_nothing(
    tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(importer, "write_safetensors", fail)
        with pytest.raises(OSError, match="disk full"):
            import_gguf(tiny_gguf, output=tmp_path / "home" / "out")
    assert files_in(tmp_path / "home") == {".out.lock"}
    assert import_gguf(tiny_gguf, output=tmp_path / "home" / "out").is_new


def test_leftovers_of_a_killed_import_are_removed(tmp_path: Path, tiny_gguf: Path) -> None:
    leftover = tmp_path / ".out.tmp-dead"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    import_gguf(tiny_gguf, output=tmp_path / "out")
    assert files_in(tmp_path) == {"tiny.gguf", "out", ".out.lock"}


def test_concurrent_imports_make_the_folder_once(tmp_path: Path, tiny_gguf: Path) -> None:
    results: list[ImportResult] = []
    threads = [
        threading.Thread(
            target=lambda: results.append(import_gguf(tiny_gguf, output=tmp_path / "out"))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(result.is_new for result in results) == [False, False, False, True]


def test_waiting_for_another_import_ends_at_its_deadline(tmp_path: Path) -> None:
    waits: list[str] = []
    with (
        exclusive(tmp_path / "out", timeout_s=1),
        pytest.raises(DeadlineExceeded, match="another process"),
        exclusive(tmp_path / "out", timeout_s=0.3, on_wait=lambda: waits.append("told")),
    ):
        pass
    assert waits == ["told"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba'; known: llama"),
        ({"pre_tokenizer": "tekken"}, "pre-tokenizer 'tekken'; known: gpt-2, smollm"),
        ({"extra_tensor": "rope_freqs.weight"}, "rope scaling stored as a tensor"),
        ({"extra_tensor": "blk.0.ssm_in.weight"}, "unknown for this architecture"),
    ],
)
def test_what_is_not_understood_is_refused(
    tmp_path: Path, make_tiny: MakeTiny, options: dict[str, str], message: str
) -> None:
    path = make_tiny(**options).write(tmp_path / "in.gguf")
    with pytest.raises(ConfigError, match=message):
        import_gguf(path, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"no gguf at all", b"GGUF\x03\x00\x00\x00"])
def test_broken_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not a readable GGUF file"):
        import_gguf(path, output=tmp_path / "out")


def test_missing_file_and_wrong_dtype_are_named(tmp_path: Path, tiny_gguf: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        import_gguf(tmp_path / "none.gguf", output=tmp_path / "out")
    with pytest.raises(ConfigError, match="'int3' is not one of bfloat16, float32"):
        import_gguf(tiny_gguf, output=tmp_path / "out", dtype="int3")


def test_cache_follows_the_xdg_variable_when_it_is_absolute(tmp_path: Path) -> None:
    assert default_cache_dir({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "baton"
    for environ in ({}, {"XDG_CACHE_HOME": ""}, {"XDG_CACHE_HOME": "relative"}):
        assert default_cache_dir(environ) == Path.home() / ".cache/baton"
    assert model_dir(tmp_path, model_name="m", dtype="float32").name == "m"


@pytest.mark.model
def test_real_model_equals_the_weights_of_the_golden_outputs(smollm2_float32_dir: Path) -> None:
    golden = json.loads(GOLDEN_FILE.read_text())
    with (smollm2_float32_dir / "model.safetensors").open("rb") as weights:
        digest = hashlib.file_digest(weights, "sha256").hexdigest()
    assert digest == golden["safetensors_fp32_sha256"]
