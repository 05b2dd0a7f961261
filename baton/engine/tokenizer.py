"""Text to token ids and back, from the files of a Hugging Face model folder. No torch.

Reads tokenizer.json, and when present tokenizer_config.json (chat template, special tokens),
chat_template.jinja, generation_config.json and config.json (end-of-sequence ids).

Does not know: stop strings, requests, the model's weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from baton.core.errors import ConfigError, InvalidRequest
from baton.engine.chat_template import ChatTemplate
from baton.engine.detokenizer import ByteDetokenizer, IncrementalDetokenizer, WindowDetokenizer
from baton.engine.token_bytes import TokenBytes, byte_rule

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class Tokenizer:
    """Immutable after loading; safe to use from several threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: tuple[int, ...] = (),
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self.eos_token_ids = eos_token_ids
        self._backend = backend
        self._chat_template = chat_template
        ids = backend.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1
        """Every id this tokenizer knows is below it; the model's embedding may have more rows."""
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._byte_rule = byte_rule(backend.decoder)
        self._bytes = TokenBytes(backend, self._byte_rule)
        self._shown_bytes = TokenBytes(backend, self._byte_rule, hidden_ids=self._special_ids)

    @classmethod
    def from_folder(cls, path: Path | str) -> Tokenizer:
        """Raises ConfigError when the folder has no usable tokenizer.json."""
        folder = Path(path)
        backend = _load_backend(folder)
        config = _read_json(folder / "tokenizer_config.json")
        special_tokens = _special_tokens(config)
        source = _chat_template_source(folder, config)
        return cls(
            backend,
            eos_token_ids=_eos_token_ids(folder, backend, special_tokens),
            chat_template=ChatTemplate(source, special_tokens=special_tokens) if source else None,
        )

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Special tokens spelled out in `text` become their ids; `add_special_tokens` adds the
        ones a text starts or ends with, which a chat template has written already.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"text is not valid Unicode: unpaired surrogate at character {error.start}; "
                "send UTF-8 text",
                param="prompt",
            ) from error
        # Unlike encode(), this lets go of the interpreter lock and computes no offsets.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence; bytes that are no text become U+FFFD."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(
        self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> IncrementalDetokenizer:
        """A fresh detokenizer for the output that follows `prompt_ids`."""
        if self._byte_rule is None:
            return WindowDetokenizer(
                lambda ids: self.decode(ids, skip_special_tokens=skip_special_tokens),
                prompt_ids=prompt_ids,
            )
        table = self._shown_bytes if skip_special_tokens else self._bytes
        return ByteDetokenizer(
            table,
            prompt_ids=prompt_ids,
            strips_space=self._byte_rule.strips_space,
            whole_text=table.whole_text,
        )

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for, possibly a part of a character; b"" if unknown."""
        return self._bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """One token alone as text; incomplete characters become U+FFFD."""
        return self._bytes(token_id).decode(errors="replace")

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Ids that are marks, not text."""
        return self._special_ids

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    @property
    def chat_template(self) -> ChatTemplate | None:
        return self._chat_template

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt text of a conversation; encode it with add_special_tokens=False.

        Raises InvalidRequest when there is no template or it refuses the messages.
        """
        if self._chat_template is None:
            raise InvalidRequest(
                "this model has no chat template; use the completions route", param="messages"
            )
        return self._chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            variables=variables,
        )


def _load_backend(folder: Path) -> tokenizers.Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(
            f"{folder} has no tokenizer.json; name a Hugging Face model folder, "
            "or make one with `baton model import`"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{file} is not a tokenizer: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    """The object in `file`, empty when there is no such file."""
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Name to text; a token is written as plain text or as an object with its content."""
    found: dict[str, str] = {}
    for name in SPECIAL_TOKEN_NAMES:
        value = config.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _chat_template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """A file of its own wins over the entry in tokenizer_config.json, as it is the newer form."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    entry = config.get("chat_template")
    if isinstance(entry, list):
        entry = {item["name"]: item["template"] for item in entry}.get("default")
    return entry if isinstance(entry, str) else None


def _eos_token_ids(
    folder: Path, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str]
) -> tuple[int, ...]:
    """generation_config.json overrules config.json; the tokenizer's own end token counts too,
    since some folders name the end of a turn only there.
    """
    entry = _read_json(folder / "generation_config.json").get("eos_token_id")
    if entry is None:
        entry = _read_json(folder / "config.json").get("eos_token_id")
    ids = list(entry) if isinstance(entry, list) else [entry]
    if "eos_token" in special_tokens:
        ids.append(backend.token_to_id(special_tokens["eos_token"]))
    return tuple(dict.fromkeys(i for i in ids if isinstance(i, int)))
