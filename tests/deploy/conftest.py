"""Rendered charts: each values file is rendered once a run."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from chart import CHART, OTHERS, PROFILES, Objects, extra_values, values_file
from tools.helm import Helm, helm_binary


@pytest.fixture(scope="session", params=[3, 4], ids=["helm3", "helm4"])
def each_helm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(helm_binary(request.param), tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(helm_binary(4), tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="session")
def rendered(helm: Helm) -> Callable[[str], Objects]:
    """The objects of a values file."""

    @functools.cache
    def render(name: str) -> Objects:
        return helm.template(CHART, values_file(name), values=extra_values(name))

    return render


@pytest.fixture(params=[*PROFILES, *OTHERS])
def objects(request: pytest.FixtureRequest, rendered: Callable[[str], Objects]) -> Objects:
    return rendered(request.param)
