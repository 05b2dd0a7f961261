"""What is installed beside what this release asks for.

Reads the metadata of distributions and imports none of them.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterator

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion

from baton.cli.doctor_types import Check, Severity

DISTRIBUTION = "baton"
SHOWN = ("torch", "ray", "grpcio", "protobuf", "nixl-cu13", "triton")
"""Those that differences between machines are about."""

VersionOf = Callable[[str], str | None]


def check_versions(
    requirements: list[str] | None = None, version_of: VersionOf | None = None
) -> Iterator[Check]:
    """`requirements`: as the metadata of a distribution has them; by default this one's."""
    installed = version_of or _installed
    if requirements is None:
        try:
            requirements = importlib.metadata.requires(DISTRIBUTION) or []
        except importlib.metadata.PackageNotFoundError:
            requirements = []
    is_bad = False
    for text in requirements:
        problem = _problem(text, installed)
        if problem:
            is_bad = True
            fix = "install it with the constraints of this release, or use its image"
            yield Check("versions", problem, Severity.ERROR, fix)
    if not is_bad:
        found = [f"{name} {version}" for name in SHOWN if (version := installed(name)) is not None]
        yield Check("versions", ", ".join([f"Python {platform.python_version()}", *found]))


def _problem(text: str, installed: VersionOf) -> str:
    """What is wrong with one requirement; empty when it is met or does not apply here."""
    try:
        requirement = Requirement(text)
    except InvalidRequirement:
        return ""
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return ""
    version = installed(requirement.name)
    if version is None:
        return f"{requirement.name} is not installed, and {requirement.specifier or 'it'} is needed"
    try:
        is_met = requirement.specifier.contains(version, prereleases=True)
    except InvalidVersion:
        is_met = False
    if is_met:
        return ""
    return f"{requirement.name} is {version}, and {requirement.specifier} is needed"


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
