"""Rebuild tokenizer.json and tokenizer_config.json from GGUF metadata.

GGUF keeps a vocabulary, merges and token kinds, but names the pre-tokenizer only ("pre"); what
such a name means is a table here. Byte-level BPE only: SentencePiece vocabularies need their own
builder next to `_byte_level_bpe`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from enum import IntEnum
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from baton.core.errors import ConfigError
from baton.model_import.architectures import Json
from baton.model_import.gguf_file import GgufFile

PREFIX = "tokenizer.ggml"


class TokenKind(IntEnum):
    """tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def write_tokenizer(file: GgufFile, folder: Path) -> None:
    """Raises ConfigError when the tokenizer is of a kind that is not known here."""
    kind = file.get(f"{PREFIX}.model", str)
    if kind not in BUILDERS:
        raise ConfigError(
            f"{file.path.name} has a tokenizer of kind {kind!r}; known: {', '.join(BUILDERS)}"
        )
    BUILDERS[kind](file).save(str(folder / "tokenizer.json"))
    text = json.dumps(_tokenizer_config(file), indent=1)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def special_ids(file: GgufFile) -> dict[str, int]:
    """bos, eos and pad token ids under the names of config.json, as far as the file has them."""
    gguf_names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    keys = {hf: f"{PREFIX}.{gguf}_token_id" for hf, gguf in gguf_names.items()}
    return {f"{hf}_token_id": file.get(key, int) for hf, key in keys.items() if file.has(key)}


def _byte_level_bpe(file: GgufFile) -> tokenizers.Tokenizer:
    pieces: list[str] = file.get(f"{PREFIX}.tokens", list)
    merges = [tuple(merge.split(" ")) for merge in file.get(f"{PREFIX}.merges", list)]
    backend = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = _pre_tokenizer(file)
    backend.decoder = decoders.ByteLevel()
    kinds = [TokenKind(kind) for kind in file.get(f"{PREFIX}.token_type", list)]
    added = [
        AddedToken(piece, special=kind is TokenKind.CONTROL, normalized=False)
        for piece, kind in zip(pieces, kinds, strict=True)
        if kind in (TokenKind.CONTROL, TokenKind.USER_DEFINED)
    ]
    backend.add_tokens(added)
    if file.get(f"{PREFIX}.add_bos_token", bool, False):
        bos_id = file.get(f"{PREFIX}.bos_token_id", int)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{pieces[bos_id]} $A",
            pair=f"{pieces[bos_id]} $A $B",
            special_tokens=[(pieces[bos_id], bos_id)],
        )
    return backend


BUILDERS: Mapping[str, Callable[[GgufFile], tokenizers.Tokenizer]] = {"gpt2": _byte_level_bpe}


def _pre_tokenizer(file: GgufFile) -> pre_tokenizers.PreTokenizer:
    name = file.get(f"{PREFIX}.pre", str)
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=file.get(f"{PREFIX}.add_space_prefix", bool, False), use_regex=True
    )
    if name == "gpt-2":
        return byte_level
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    raise ConfigError(
        f"{file.path.name} uses the pre-tokenizer {name!r}; known: gpt-2, smollm; use the model's "
        "Hugging Face folder"
    )


def _tokenizer_config(file: GgufFile) -> Json:
    pieces = file.get(f"{PREFIX}.tokens", list)
    config: Json = {"tokenizer_class": "PreTrainedTokenizerFast"}
    gguf_names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    for hf_name, gguf_name in gguf_names.items():
        key = f"{PREFIX}.{gguf_name}_token_id"
        if file.has(key):
            config[f"{hf_name}_token"] = pieces[file.get(key, int)]
    config["model_max_length"] = file.arch_get("context_length", int)
    config["add_prefix_space"] = file.get(f"{PREFIX}.add_space_prefix", bool, False)
    config["clean_up_tokenization_spaces"] = False
    if file.has("tokenizer.chat_template"):
        config["chat_template"] = file.get("tokenizer.chat_template", str)
    return config
