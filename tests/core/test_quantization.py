"""quantization_config: what is written is read back, and everything else is refused by name."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from baton.core.errors import ConfigError
from baton.core.quantization import (
    QuantizationConfig,
    Scheme,
    parse_quantization,
    quantization_json,
    weight_scheme,
)

CONFIGS = [
    QuantizationConfig(Scheme.FP8),
    QuantizationConfig(Scheme.FP8_WEIGHT, quantizes_head=True),
    QuantizationConfig(Scheme.INT8, has_kv_scales=True),
    *(QuantizationConfig(Scheme.INT4, size) for size in (32, 64, 128)),
    QuantizationConfig(None, has_kv_scales=True),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_written_config_is_read_back(config: QuantizationConfig) -> None:
    assert parse_quantization(json.loads(json.dumps(quantization_json(config)))) == config


def test_formats_are_those_other_servers_choose_their_kernels_by() -> None:
    """Field by field, as a reader of compressed-tensors looks them up."""
    fp8: Any = quantization_json(QuantizationConfig(Scheme.FP8))
    group = fp8["config_groups"]["group_0"]
    assert (fp8["quant_method"], fp8["format"]) == ("compressed-tensors", "float-quantized")
    assert fp8["ignore"] == ["lm_head"]
    assert group["weights"]["strategy"] == "channel"
    assert group["input_activations"]["strategy"] == "token"
    assert group["input_activations"]["dynamic"] is True
    int4: Any = quantization_json(QuantizationConfig(Scheme.INT4, 64))
    weights = int4["config_groups"]["group_0"]["weights"]
    assert int4["format"] == "pack-quantized"
    assert (weights["num_bits"], weights["type"], weights["group_size"]) == (4, "int", 64)
    assert int4["config_groups"]["group_0"]["input_activations"] is None
    int8: Any = quantization_json(QuantizationConfig(Scheme.INT8))
    assert int8["format"] == "pack-quantized"
    kv: Any = quantization_json(QuantizationConfig(None, has_kv_scales=True))
    assert kv["kv_cache_scheme"]["strategy"] == "attn_head"


def changed(path: tuple[str, ...], value: Any) -> Any:
    """An int4 folder's quantization_config with one value replaced."""
    raw: Any = copy.deepcopy(quantization_json(QuantizationConfig(Scheme.INT4, 64)))
    raw["config_groups"]["group_0"].pop("format")
    place = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return raw


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("quant_method",), "awq", "'awq'"),
        (("ignore",), ["lm_head", "model.layers.0.mlp.down_proj"], "down_proj"),
        (("format",), "marlin-24", "marlin-24"),
        (("config_groups", "group_0", "targets"), ["re:.*q_proj"], "q_proj"),
        (("config_groups", "group_0", "weights", "num_bits"), 3, "3-bit"),
        (("config_groups", "group_0", "weights", "group_size"), 16, "16"),
        (("config_groups", "group_0", "weights", "symmetric"), False, "asymmetric"),
        (("config_groups", "group_0", "weights", "actorder"), "group", "reordered"),
        (("config_groups", "group_0", "weights", "strategy"), "tensor", "tensor"),
        (("config_groups", "group_1"), {}, "2 config_groups"),
        (("kv_cache_scheme",), {"num_bits": 8, "type": "float", "strategy": "tensor"}, "tensor"),
        (("kv_cache_scheme",), {"num_bits": 8, "type": "int", "strategy": "attn_head"}, "int"),
    ],
)
def test_other_quantisations_are_refused_by_name(
    path: tuple[str, ...], value: Any, named: str
) -> None:
    with pytest.raises(ConfigError) as error:
        parse_quantization(changed(path, value))
    assert named in str(error.value)


GROUP = ("config_groups", "group_0")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("quant_method",), ["awq"], "['awq']"),
        (("format",), 4, "quantization_config.format must be a string, got 4"),
        (("config_groups",), 5, "quantization_config.config_groups must be an object, got 5"),
        (("config_groups",), [], "quantization_config.config_groups must be an object, got []"),
        (GROUP, None, "config_groups.group_0 must be an object, got None"),
        ((*GROUP, "weights"), None, "group_0.weights must be an object, got None"),
        ((*GROUP, "weights", "num_bits"), None, "weights.num_bits must be an integer, got None"),
        (
            (*GROUP, "weights", "num_bits"),
            "four",
            "weights.num_bits must be an integer, got 'four'",
        ),
        ((*GROUP, "weights", "num_bits"), True, "weights.num_bits must be an integer, got True"),
        (
            (*GROUP, "weights", "group_size"),
            [64],
            "weights.group_size must be an integer, got [64]",
        ),
        (
            (*GROUP, "weights", "group_size"),
            None,
            "weights.group_size must be an integer, got None",
        ),
        ((*GROUP, "weights", "type"), 4, "weights.type must be a string, got 4"),
        ((*GROUP, "weights", "strategy"), {}, "weights.strategy must be a string, got {}"),
        ((*GROUP, "weights", "symmetric"), "yes", "symmetric must be true or false, got 'yes'"),
        ((*GROUP, "weights", "dynamic"), "local", "dynamic must be true or false, got 'local'"),
        ((*GROUP, "input_activations"), 8, "group_0.input_activations must be an object, got 8"),
        (("ignore",), 5, "quantization_config.ignore must be a list of strings, got 5"),
        (("ignore",), "lm_head", "quantization_config.ignore must be a list of strings"),
        (("ignore",), [["a"]], "quantization_config.ignore must be a list of strings, got [['a']]"),
        (("kv_cache_scheme",), "fp8", "quantization_config.kv_cache_scheme must be an object"),
        (("kv_cache_scheme",), {"num_bits": "8"}, "kv_cache_scheme.strategy must be a string"),
    ],
)
def test_malformed_values_are_named_with_their_place(
    path: tuple[str, ...], value: Any, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        parse_quantization(changed(path, value))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ((*GROUP, "output_activations"), {"num_bits": 8, "type": "float"}, "output_activations"),
        (("sparsity_config",), {"format": "sparse-24-bitmask"}, "sparsity_config"),
        (("transform_config",), {"config_groups": {"R1": {}}}, "transform_config"),
    ],
)
def test_what_changes_the_computed_function_is_refused_by_name(
    path: tuple[str, ...], value: Any, named: str
) -> None:
    with pytest.raises(ConfigError, match=f"{named}.*not supported"):
        parse_quantization(changed(path, value))


@pytest.mark.parametrize("name", ["sparsity_config", "transform_config"])
@pytest.mark.parametrize("value", [None, {}])
def test_what_is_named_and_empty_changes_nothing(name: str, value: Any) -> None:
    expected = QuantizationConfig(Scheme.INT4, 64)
    assert parse_quantization(changed((name,), value)) == expected


@pytest.mark.parametrize(
    ("scheme", "group_size"), [(Scheme.INT4, None), (Scheme.INT4, 48), (Scheme.FP8, 64)]
)
def test_group_size_belongs_to_int4(scheme: Scheme, group_size: int | None) -> None:
    with pytest.raises(ConfigError, match="group_size"):
        QuantizationConfig(scheme, group_size)


def test_scheme_of_the_weights_may_be_none_in_two_ways() -> None:
    assert weight_scheme(None) is None
    assert weight_scheme(QuantizationConfig(None, has_kv_scales=True)) is None
    assert weight_scheme(QuantizationConfig(Scheme.INT8)) is Scheme.INT8


def test_width_that_does_not_fit_names_a_group_size_that_does() -> None:
    config = QuantizationConfig(Scheme.INT4, 128)
    config.check_width(1536, "hidden_size")
    with pytest.raises(ConfigError, match=r"128 does not divide hidden_size 576.*group size 64"):
        config.check_width(576, "hidden_size")
    with pytest.raises(ConfigError, match="take fp8"):
        config.check_width(100, "hidden_size")
    with pytest.raises(ConfigError, match="packed word of 4"):
        QuantizationConfig(Scheme.INT8).check_width(30, "hidden_size")
    QuantizationConfig(Scheme.FP8).check_width(7, "hidden_size")
