"""Tokenizer: tiny vocabularies built here, the real one against the golden file."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from baton.core.errors import ConfigError, InvalidRequest
from baton.engine.tokenizer import Tokenizer

GOLDEN_FILE = Path(__file__).parents[1] / "parity/golden/smollm2_135m_instruct_greedy.json"
UNICODE_RANGES = ((0x20, 0x7E), (0xA0, 0x17F), (0x4E00, 0x4FFF), (0x1F300, 0x1F5FF), (0x900, 0x97F))


def random_text(rng: random.Random, length: int) -> str:
    return "".join(chr(rng.randint(*rng.choice(UNICODE_RANGES))) for _ in range(length))


def byte_level_backend() -> Backend:
    """One token per byte, then <bos> 256, <eos> 257."""
    chars = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({c: i for i, c in enumerate(chars)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<bos>", "<eos>")])
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 256)]
    )
    return backend


SENTENCEPIECE_VOCABULARY = {
    **{f"<0x{byte:02X}>": byte for byte in range(256)},
    "▁Hello": 256, "▁world": 257, "!": 258, "▁": 259, "é": 260, "<s>": 261,
}  # fmt: skip


def sentencepiece_backend(*steps: Any) -> Backend:
    backend = Backend(models.BPE(SENTENCEPIECE_VOCABULARY, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *steps]
    )
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    return backend


def stripping_backend() -> Backend:
    return sentencepiece_backend(decoders.Strip(" ", 1, 0))


def metaspace_backend() -> Backend:
    """No byte rule fits this decoder, so it goes through the window."""
    backend = sentencepiece_backend()
    backend.decoder = decoders.Metaspace()
    return backend


def stream(tokenizer: Tokenizer, ids: list[int], prompt_ids: list[int] | None = None) -> str:
    """Token by token; no piece may end inside a character."""
    detokenizer = tokenizer.detokenizer(prompt_ids or [])
    return "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush()


@cache
def golden_cases() -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = json.loads(GOLDEN_FILE.read_text())["items"]
    return items


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_dir: Path) -> Tokenizer:
    return Tokenizer.from_folder(smollm2_dir)


@pytest.mark.model
def test_golden_prompts_become_the_golden_ids(smollm2_tokenizer: Tokenizer) -> None:
    for case in golden_cases():
        ids = smollm2_tokenizer.encode(case["prompt_text"], add_special_tokens=False)
        assert ids == case["prompt_token_ids"], case["name"]


@pytest.mark.model
def test_chat_template_renders_the_golden_prompts(smollm2_tokenizer: Tokenizer) -> None:
    chats = [case for case in golden_cases() if case["kind"] == "chat"]
    assert chats
    for case in chats:
        text = smollm2_tokenizer.apply_chat_template(case["messages"])
        assert text == case["prompt_text"], case["name"]


@pytest.mark.model
def test_golden_outputs_stream_to_the_golden_texts(smollm2_tokenizer: Tokenizer) -> None:
    for case in golden_cases():
        ids = case["output_token_ids"]
        assert smollm2_tokenizer.decode(ids) == case["output_text"], case["name"]
        text = stream(smollm2_tokenizer, ids, case["prompt_token_ids"])
        assert text == case["output_text"], case["name"]


@pytest.mark.model
def test_any_unicode_streams_whole_at_every_split(smollm2_tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(200):
        text = random_text(rng, rng.randint(1, 40))
        ids = smollm2_tokenizer.encode(text, add_special_tokens=False)
        assert stream(smollm2_tokenizer, ids) == text
        split = rng.randint(0, len(ids))
        detokenizer = smollm2_tokenizer.detokenizer()
        parts = [detokenizer.push(ids[:split]), detokenizer.push(ids[split:])]
        assert text.startswith(parts[0])
        assert "".join(parts) + detokenizer.flush() == text


@pytest.mark.model
def test_random_ids_stream_like_the_whole_decode(smollm2_tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(100):
        ids = [rng.randrange(smollm2_tokenizer.vocab_size) for _ in range(50)]
        assert stream(smollm2_tokenizer, ids) == smollm2_tokenizer.decode(ids)


@pytest.mark.model
def test_real_model_ends_at_its_end_token(smollm2_tokenizer: Tokenizer) -> None:
    assert smollm2_tokenizer.eos_token_ids == (2,)
    assert smollm2_tokenizer.vocab_size == 49152
    assert smollm2_tokenizer.token_text(2) == "<|im_end|>"


@pytest.mark.model
def test_token_bytes_of_the_whole_vocabulary_join_to_the_text(smollm2_tokenizer: Tokenizer) -> None:
    text = "naïve 日本語 🙂\n\ttabs  and 123"
    ids = smollm2_tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(smollm2_tokenizer.token_bytes, ids)) == text.encode()
    ids = range(smollm2_tokenizer.vocab_size)
    assert all(smollm2_tokenizer.token_bytes(i) for i in ids)


def test_special_tokens_are_added_only_on_request() -> None:
    tokenizer = Tokenizer(byte_level_backend())
    plain = tokenizer.encode("hi", add_special_tokens=False)
    assert tokenizer.encode("hi", add_special_tokens=True) == [256, *plain]


def test_special_tokens_show_only_on_request() -> None:
    tokenizer = Tokenizer(byte_level_backend())
    ids = [256, *tokenizer.encode("hi", add_special_tokens=False), 257]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<bos>hi<eos>"
    assert stream(tokenizer, ids) == "hi"
    shown = tokenizer.detokenizer(skip_special_tokens=False)
    assert shown.push(ids) + shown.flush() == "<bos>hi<eos>"


def test_unpaired_surrogate_is_an_invalid_request() -> None:
    with pytest.raises(InvalidRequest, match="surrogate at character 1"):
        Tokenizer(byte_level_backend()).encode("a\ud83d", add_special_tokens=False)


def test_unknown_ids_are_empty() -> None:
    tokenizer = Tokenizer(byte_level_backend())
    assert tokenizer.token_bytes(100_000) == b""
    assert tokenizer.token_text(100_000) == ""
    assert tokenizer.decode([100_000]) == ""
    assert stream(tokenizer, [100_000]) == ""


@pytest.mark.parametrize("make", [sentencepiece_backend, stripping_backend, metaspace_backend])
def test_leading_space_streams_like_the_whole_decode(make: Any) -> None:
    tokenizer = Tokenizer(make())
    for ids in ([256, 257, 258], [261, 256, 258, 257], [259, 256], [258, 259, 259, 258]):
        assert stream(tokenizer, ids) == tokenizer.decode(ids), ids


@pytest.mark.parametrize("make", [sentencepiece_backend, stripping_backend, metaspace_backend])
def test_leading_space_stays_after_a_prompt(make: Any) -> None:
    assert stream(Tokenizer(make()), [257, 258], prompt_ids=[256]) == " world!"


@pytest.mark.parametrize("make", [sentencepiece_backend, stripping_backend])
def test_byte_fallback_pieces_form_one_character(make: Any) -> None:
    tokenizer = Tokenizer(make())
    detokenizer = tokenizer.detokenizer()
    emoji = list("🙂".encode())
    assert [detokenizer.push([byte]) for byte in emoji] == ["", "", "", "🙂"]
    assert tokenizer.token_bytes(emoji[0]) == b"\xf0"
    assert tokenizer.token_bytes(256) == b" Hello"
    assert tokenizer.token_text(emoji[0]) == "\ufffd"


def folder_with(tmp_path: Path, **files: object) -> Path:
    """A model folder; each keyword is a JSON file by its stem."""
    byte_level_backend().save(str(tmp_path / "tokenizer.json"))
    for stem, content in files.items():
        (tmp_path / f"{stem}.json").write_text(json.dumps(content))
    return tmp_path


def test_end_tokens_come_from_generation_config_and_tokenizer(tmp_path: Path) -> None:
    folder = folder_with(
        tmp_path,
        generation_config={"eos_token_id": [7, 8]},
        config={"eos_token_id": 9},
        tokenizer_config={"eos_token": {"content": "<eos>"}},
    )
    assert Tokenizer.from_folder(folder).eos_token_ids == (7, 8, 257)


def test_end_token_falls_back_to_the_model_config(tmp_path: Path) -> None:
    assert Tokenizer.from_folder(folder_with(tmp_path)).eos_token_ids == ()
    folder = folder_with(tmp_path, config={"eos_token_id": 9})
    assert Tokenizer.from_folder(folder).eos_token_ids == (9,)


def test_template_file_wins_over_the_config_entry(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "from list"}]
    folder = folder_with(tmp_path, tokenizer_config={"chat_template": named})
    assert Tokenizer.from_folder(folder).apply_chat_template([]) == "from list"
    (folder / "chat_template.jinja").write_text("from file")
    assert Tokenizer.from_folder(folder).apply_chat_template([]) == "from file"


def test_model_without_template_refuses_chat(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])


def test_folder_without_tokenizer_names_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="baton model import"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_broken_json_beside_the_tokenizer_is_named(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.from_folder(folder)


def test_importing_the_tokenizer_loads_no_tensor_library() -> None:
    code = (
        "import sys, baton.engine.tokenizer; print(sorted({'torch','numpy','ray'}&{*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
