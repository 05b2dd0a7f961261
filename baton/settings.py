"""Settings of a process from their layers, and the settings that every process has.

Layers, lowest first: field defaults, `defaults`, a YAML file, the environment
(`BATON_<SECTION>__<FIELD>`), overrides (command line). `baton.core.config` does the typing; this
file adds what is not in the standard library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import yaml

from baton.core.config import build, env_values, merge
from baton.core.errors import ConfigError
from baton.core.logging import setup_logging

T = TypeVar("T")


class LogFormat(Enum):
    JSON = "json"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class LogConfig:
    """What a process writes to stderr."""

    format: LogFormat = LogFormat.JSON
    level: str = "INFO"

    def __post_init__(self) -> None:
        if self.level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            raise ConfigError(
                f"log.level must be DEBUG, INFO, WARNING or ERROR, got {self.level!r}"
            )


def start_logging(component: str, config: LogConfig, file: Path | None = None) -> None:
    """Log as configured, to stderr or appended to `file`. Called once at a process's start."""
    setup_logging(
        component,
        level=config.level,
        as_json=config.format is LogFormat.JSON,
        stream=file.open("a", buffering=1) if file is not None else None,
    )


def merge_layers(
    cls: type[Any],
    *,
    defaults: Mapping[str, Any] | None = None,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The settings of `cls` that any layer names, before types and defaults."""
    return merge(
        defaults or {},
        read_yaml(file) if file is not None else {},
        env_values(environ or {}, cls),
        overrides or {},
    )


def load(
    cls: type[T],
    *,
    defaults: Mapping[str, Any] | None = None,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> T:
    """Build configuration dataclass `cls`. Raises ConfigError naming the wrong key."""
    layers = merge_layers(cls, defaults=defaults, file=file, environ=environ, overrides=overrides)
    return build(cls, layers)


def parse_override(text: str) -> dict[str, Any]:
    """`section.field=value` as nested mappings. Raises ConfigError on another shape."""
    path, separator, value = text.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(f"override {text!r} is not of the form section.field=value")
    nested: Any = value
    for key in reversed(keys):
        nested = {key: nested}
    return dict(nested)


def read_yaml(file: Path) -> Mapping[str, Any]:
    """The settings in `file`; an empty file has none. Raises ConfigError."""
    try:
        values = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"configuration file {file}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"configuration file {file} must hold a mapping of settings")
    return values


def check_positive(section: str, config: object, *names: str) -> None:
    """Raises ConfigError naming the first of `names` in `config` that is not above zero."""
    for name in names:
        value = getattr(config, name)
        # Not `<= 0`, which lets nan pass.
        if not value > 0:
            raise ConfigError(f"{section}.{name} must be positive, got {value}")
