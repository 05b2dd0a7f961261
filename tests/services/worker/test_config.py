import functools
from pathlib import Path

import pytest

from baton.core.errors import ConfigError
from baton.core.worker_info import Role
from baton.engine.config import Device
from baton.settings import parse_override
from kvtransfer.select import TransportKind
from services.decode import config as decode
from services.prefill import config as prefill
from services.worker.config import defaults_for_device, load_worker_config

MODEL = {"engine": {"model_path": "/models/tiny"}}


def test_pools_differ_in_their_defaults():
    p = load_worker_config(defaults=prefill.DEFAULTS, overrides=MODEL)
    d = load_worker_config(defaults=decode.DEFAULTS, overrides=MODEL)
    assert (p.role, d.role) == (Role.PREFILL, Role.DECODE)
    assert p.engine.max_num_seqs < d.engine.max_num_seqs
    assert p.engine.max_num_batched_tokens > d.engine.max_num_batched_tokens
    assert p.served_model_name == "tiny"
    assert p.host == "127.0.0.1"


def test_later_layers_win(tmp_path):
    file = tmp_path / "worker.yaml"
    file.write_text("port: 1\ndrain_s: 3\nengine: {max_num_seqs: 3, model_path: /m}\n")
    environ = {"BATON_PORT": "2", "BATON_ENGINE__MAX_NUM_SEQS": "4", "HOME": "/"}
    config = load_worker_config(
        defaults=prefill.DEFAULTS,
        file=file,
        environ=environ,
        overrides=parse_override("engine.max_num_seqs=5"),
    )
    assert (config.drain_s, config.port, config.engine.max_num_seqs) == (3.0, 2, 5)
    assert config.engine.model_path == Path("/m")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engine.max_num_seq=3", "unknown setting engine.max_num_seq"),
        ("transfer.transport=rdma", "transfer.transport must be one of auto, nixl, mapped"),
        ("port=70000", "port must be between 0 and 65535, got 70000"),
        ("transfer.cluster_secret=short", "has 5 characters"),
        ("transfer.lease_s=0", "transfer.lease_s must be positive, got 0"),
        ("transfer.max_fetch_share=0", "transfer.max_fetch_share must be above 0"),
        ("tiers.host_bytes=-1", "tiers.host_bytes must not be negative"),
        ("tiers.disk_path=/tmp", "tiers.disk_path is set but tiers.disk_bytes is 0"),
        ("host=0.0.0.0", "set advertise_host"),
        ("log.level=LOUD", "log.level must be"),
        ("port", "not of the form"),
        ("engine..x=1", "not of the form"),
    ],
)
def test_wrong_setting_is_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_worker_config(
            defaults=decode.DEFAULTS,
            overrides={**MODEL, **parse_override(override)},
        )


def test_secret_is_not_shown(tmp_path):
    overrides = {**MODEL, **parse_override("transfer.cluster_secret=0123456789abcdef")}
    config = load_worker_config(defaults=decode.DEFAULTS, overrides=overrides)
    assert "0123456789abcdef" not in repr(config)
    assert config.transfer.transport is TransportKind.AUTO


def test_broken_file_is_a_configuration_error(tmp_path):
    file = tmp_path / "worker.yaml"
    for text in ("- a\n", "a: [\n"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"worker\.yaml"):
            load_worker_config(defaults=decode.DEFAULTS, file=file)
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        load_worker_config(defaults=decode.DEFAULTS, file=tmp_path / "none.yaml")


def test_missing_model_is_named():
    with pytest.raises(ConfigError, match="model_path"):
        load_worker_config(defaults=decode.DEFAULTS, overrides={"engine": {}})


def test_hanging_rank_is_found_before_the_worker_gives_up():
    """With one rank nobody looks at the ranks' time limit."""
    slow = {"engine": {**MODEL["engine"], "rank_timeout_s": 60}}
    assert load_worker_config(defaults=decode.DEFAULTS, overrides=slow).engine.tp_size == 1
    slow["engine"]["tp_size"] = 2
    with pytest.raises(ConfigError, match=r"rank_timeout_s 60 is not below .*step_timeout_s 60"):
        load_worker_config(defaults=decode.DEFAULTS, overrides=slow)


def test_a_gpu_brings_defaults_of_its_own_below_what_is_set():
    on_gpu = load_worker_config(
        defaults=decode.DEFAULTS,
        overrides={"engine": {"model_path": "/m", "device": "cuda", "max_num_seqs": 7}},
    ).engine
    assert (on_gpu.block_size, on_gpu.max_num_batched_tokens) == (64, 8192)
    assert on_gpu.max_num_seqs == 7
    on_cpu = load_worker_config(defaults=decode.DEFAULTS, overrides=MODEL).engine
    assert (on_cpu.block_size, on_cpu.max_num_batched_tokens) == (16, 128)


@pytest.mark.parametrize("pool", [decode, prefill], ids=["decode", "prefill"])
def test_settings_for_a_gpu_are_checked_against_the_defaults_for_one(pool):
    """More sequences than the pool's token budget on a CPU."""
    engine = load_worker_config(
        defaults=pool.DEFAULTS,
        overrides={"engine": {"model_path": "/m", "device": "cuda", "max_num_seqs": 1000}},
    ).engine
    assert (engine.max_num_seqs, engine.max_num_batched_tokens) == (1000, 8192)


def test_device_counts_in_whatever_layer_it_is_named(tmp_path):
    file = tmp_path / "worker.yaml"
    file.write_text("engine: {device: cuda, model_path: /m}\n")
    load = functools.partial(load_worker_config, defaults=decode.DEFAULTS, file=file)
    assert load().engine.block_size == 64
    assert load(environ={"BATON_ENGINE__DEVICE": "cpu"}).engine.block_size == 16
    overrides = {"engine": {"device": Device.CUDA}}
    assert (
        load(environ={"BATON_ENGINE__DEVICE": "cpu"}, overrides=overrides).engine.block_size == 64
    )


def test_defaults_for_a_device_keep_the_rest_of_the_pool():
    on_gpu = defaults_for_device(decode.DEFAULTS, {"engine": {"device": "cuda"}})
    assert on_gpu["role"] == "decode"
    assert on_gpu["engine"]["max_num_seqs"] == 256
    for settings in ({}, {"engine": None}, {"engine": {}}, {"engine": {"device": "cpu"}}):
        assert defaults_for_device(decode.DEFAULTS, settings) == decode.DEFAULTS


@pytest.mark.parametrize("engine", ["fast", {"device": "gpu"}, {"device": ["cuda"]}])
def test_wrong_engine_sections_are_still_named(engine):
    with pytest.raises(ConfigError, match="engine"):
        load_worker_config(defaults=decode.DEFAULTS, overrides={"engine": engine})
