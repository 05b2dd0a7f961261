from __future__ import annotations

from pathlib import Path

import pytest

from baton.core.errors import ConfigError
from baton.core.worker_info import Role
from baton.telemetry.metrics import Metrics
from services.router.config import RouterConfig, load_router_config
from services.router.core import RouterCore


def test_layers_from_file_environment_and_overrides(tmp_path):
    file = tmp_path / "router.yaml"
    file.write_text("model_path: /models/m\ndispatch: {max_retries: 5}\nhttp_port: 1\n")
    config = load_router_config(
        file=file,
        environ={
            "BATON_DISPATCH__STALL_S": "7",
            "BATON_HTTP_PORT": "2",
            "BATON_MIGRATION__ENABLED": "false",
        },
        overrides={"http_port": 3, "health": {"required_roles": ["decode"]}},
    )
    assert config.dispatch.max_retries == 5 and config.dispatch.stall_s == 7.0
    assert config.http_port == 3 and not config.migration.enabled
    assert config.health.required_roles == (Role.DECODE,)
    assert config.served_model_name == "m"


@pytest.mark.parametrize(
    "values",
    [
        {"http_port": 70000},
        {"session": {"idle_timeout_s": 0}},
        {"session": {"backoff_min_s": 3, "backoff_max_s": 2}},
        {"edge": {"deadline_s": 0}},
        {"edge": {"stop_grace_s": -1}},
        {"dispatch": {"max_retries": -1}},
        {"policy": {"local_prefill_max_tokens": -1}},
        {"policy": {"min_offer_blocks": 0}},
        {"migration": {"low_watermark": 0.2, "high_watermark": 0.1}},
        {"migration": {"low_watermark": -0.1}},
        {"migration": {"high_watermark": 1.5}},
        {"migration": {"max_concurrent": 0}},
        {"migration": {"min_remaining_tokens": -1}},
        {"migration": {"takeover_timeout_s": 0}},
        {"index": {"max_entries": 0}},
        {"health": {"load_fresh_s": -1}},
        {"registry_dir": "/x", "workers": ["h:1"]},
        {"tenants": {"default": {"slo_class": "gold"}}},
        {"tenants": {"named": {"acme": {"slo_class": "gold"}}}},
        {"tenants": {"require_key": True}},
        {"unheard_of": 1},
    ],
)
def test_wrong_settings_stop_the_start(values):
    with pytest.raises(ConfigError):
        load_router_config(overrides={"model_path": "/m", **values})


def test_keys_may_be_required_where_there_is_a_place_for_them():
    for place in ({"shared": {"url": "redis://h:1/0"}}, {"shared": {"place": "ray"}}):
        values = {"model_path": "/m", "tenants": {"require_key": True}, **place}
        assert load_router_config(overrides=values).tenants.needs_key


def test_core_needs_a_tokenizer_and_a_source_of_workers(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        RouterCore.from_config(RouterConfig(model_path=tmp_path, workers=("h:1",)))
    with pytest.raises(ConfigError, match="source of workers"):
        from services.router.core import _membership

        _membership(RouterConfig(model_path=Path("/m")), Metrics())
