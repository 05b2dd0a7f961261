"""How a checkpoint's weights are quantised: the part of config.json called quantization_config.

Written and read in the vocabulary of compressed-tensors, so that other servers can read a folder
made here. What is not one of the schemes below is refused by name. docs/quantization.md lists
every field and tensor. Not known here: tensors, and how numbers are rounded.

Source: https://github.com/vllm-project/compressed-tensors (quant_config.py, quant_args.py)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from baton.core.errors import ConfigError

T = TypeVar("T")

QUANT_METHOD = "compressed-tensors"
FLOAT_FORMAT = "float-quantized"
PACK_FORMAT = "pack-quantized"
HEAD_NAME = "lm_head"
WORD_BITS = 32
"""Of the words that integers are packed into."""
GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP_SIZE = 64
"""Divides the widths of every model seen so far, 576 of SmolLM2-135M among them."""


class Scheme(Enum):
    """What the weights of the projections are stored as."""

    FP8 = "fp8"
    """e4m3 with a scale per output channel; activations are rounded to e4m3 with a scale per token
    while the model runs."""
    FP8_WEIGHT = "fp8-weight"
    """The same weights; activations stay as they are."""
    INT8 = "int8"
    """Integers with a scale per output channel; activations stay as they are."""
    INT4 = "int4"
    """Integers with a scale per group of input channels; activations stay as they are."""

    @property
    def num_bits(self) -> int:
        return 4 if self is Scheme.INT4 else 8

    @property
    def is_float(self) -> bool:
        return self in (Scheme.FP8, Scheme.FP8_WEIGHT)


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """What is quantised in a folder, and how."""

    scheme: Scheme | None
    """None when only KV is."""
    group_size: int | None = None
    """Input channels that share a scale; of INT4 only."""
    quantizes_head: bool = False
    """An untied lm_head is stored like the projections."""
    has_kv_scales: bool = False
    """The folder holds a K and a V scale for every layer and KV head."""

    def __post_init__(self) -> None:
        if (self.scheme is Scheme.INT4) != (self.group_size is not None):
            raise ConfigError(
                f"group_size {self.group_size} does not go with scheme "
                f"{self.scheme.value if self.scheme else None}; int4 has one, the others none"
            )
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise ConfigError(f"group_size {self.group_size} is not one of {list(GROUP_SIZES)}")

    @property
    def name(self) -> str:
        """For people."""
        parts = []
        if self.scheme is not None:
            group = "" if self.group_size is None else f" group {self.group_size}"
            parts.append(self.scheme.value + group)
        if self.has_kv_scales:
            parts.append("KV scales")
        return " + ".join(parts) or "nothing"

    def check_width(self, width: int, what: str) -> None:
        """Raises ConfigError when `width` input channels are no whole groups or packed words."""
        if self.scheme is None or self.scheme.is_float:
            return
        if self.group_size is None:
            unit, unit_name = WORD_BITS // self.scheme.num_bits, "a packed word of"
        else:
            unit, unit_name = self.group_size, "group_size"
        if width % unit:
            fitting = [size for size in GROUP_SIZES if width % size == 0]
            fix = f"take int4 with group size {fitting[-1]}" if fitting else "take fp8"
            raise ConfigError(f"{unit_name} {unit} does not divide {what} {width}; {fix}")


def weight_scheme(config: QuantizationConfig | None) -> Scheme | None:
    """Of a model's projections; None when they are plain, whatever the folder says of KV."""
    return None if config is None else config.scheme


def quantization_json(config: QuantizationConfig) -> dict[str, object]:
    """The value of quantization_config in config.json."""
    groups: dict[str, object] = {}
    is_float = config.scheme is None or config.scheme.is_float
    stored_as = FLOAT_FORMAT if is_float else PACK_FORMAT
    if config.scheme is not None:
        weights = _arguments(
            config.scheme.num_bits,
            is_float=is_float,
            strategy="channel" if config.group_size is None else "group",
            group_size=config.group_size,
        )
        groups["group_0"] = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": (
                _arguments(8, is_float=True, strategy="token", is_dynamic=True)
                if config.scheme is Scheme.FP8
                else None
            ),
            "output_activations": None,
            "format": stored_as,
        }
    kv = _arguments(8, is_float=True, strategy="attn_head") if config.has_kv_scales else None
    return {
        "quant_method": QUANT_METHOD,
        "format": stored_as,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [] if config.quantizes_head else [HEAD_NAME],
        "kv_cache_scheme": kv,
    }


def _arguments(
    num_bits: int,
    *,
    is_float: bool,
    strategy: str,
    group_size: int | None = None,
    is_dynamic: bool = False,
) -> dict[str, object]:
    return {
        "num_bits": num_bits,
        "type": "float" if is_float else "int",
        "symmetric": True,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": is_dynamic,
    }


def parse_quantization(raw: object) -> QuantizationConfig:
    """The checked form of config.json's quantization_config. Raises ConfigError."""
    where = "quantization_config"
    config = _object(raw, where)
    method = config.get("quant_method")
    if method != QUANT_METHOD:
        raise ConfigError(
            f"quantization method {method!r} is not supported; take the model in float32, bfloat16 "
            f"or float16, or {QUANT_METHOD!r} as `baton model quantize` writes it"
        )
    _refuse_present(config, where, "sparsity_config", "transform_config")
    groups = config.get("config_groups")
    groups = {} if groups is None else _object(groups, f"{where}.config_groups")
    if len(groups) > 1:
        raise ConfigError(
            f"quantization_config has {len(groups)} config_groups; supported is one for all layers"
        )
    stored_as = _typed(config, where, "format", str, "")
    scheme, group_size = None, None
    for name, group in groups.items():
        scheme, group_size = _parse_group(group, f"{where}.config_groups.{name}", stored_as)
    ignored = _strings(config, where, "ignore")
    if ignored - {HEAD_NAME}:
        raise ConfigError(
            f"quantization_config leaves {sorted(ignored - {HEAD_NAME})[0]!r} unquantised; "
            f"supported is {HEAD_NAME!r} alone"
        )
    return QuantizationConfig(
        scheme,
        group_size,
        quantizes_head=scheme is not None and HEAD_NAME not in ignored,
        has_kv_scales=_parse_kv(config.get("kv_cache_scheme"), f"{where}.kv_cache_scheme"),
    )


def _parse_group(raw: object, where: str, stored_as: str) -> tuple[Scheme, int | None]:
    group = _object(raw, where)
    if group.get("targets") != ["Linear"]:
        raise ConfigError(
            f"quantization targets {group.get('targets')!r} are not supported; supported is "
            "['Linear']"
        )
    _refuse_present(group, where, "output_activations")
    stored_as = _typed(group, where, "format", str, stored_as)
    weights = _Arguments.parse(group.get("weights"), f"{where}.weights")
    activations = None
    if group.get("input_activations") is not None:
        activations = _Arguments.parse(group["input_activations"], f"{where}.input_activations")
    for scheme, expected_weights, expected_activations, expected_format in _KNOWN:
        is_group = scheme is Scheme.INT4 and weights.group_size in GROUP_SIZES
        if (
            weights == (expected_weights.with_group(weights.group_size if is_group else None))
            and activations == expected_activations
            and stored_as == expected_format
        ):
            return scheme, weights.group_size
    raise ConfigError(
        f"quantization format {stored_as!r} with weights {weights} and activations "
        f"{activations or 'unquantised'} is not supported; supported are "
        f"{', '.join(scheme.value for scheme in Scheme)} as `baton model quantize` writes them"
    )


def _parse_kv(raw: object, where: str) -> bool:
    if raw is None:
        return False
    found = _Arguments.parse(raw, where)
    if found != _Arguments("attn_head", 8, "float"):
        raise ConfigError(
            f"kv_cache_scheme {found} is not supported; supported is 8-bit float per attn_head"
        )
    return True


def _object(raw: object, where: str) -> Mapping[str, object]:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where} must be an object, got {raw!r}")
    return raw


def _typed(
    raw: Mapping[str, object], where: str, key: str, kind: type[T], default: T | None = None
) -> T:
    """`raw[key]`, or the default where it is absent or null. Raises ConfigError."""
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{where}.{key} must be {_KIND_NAMES[kind]}, got {value!r}")
    return value


def _strings(raw: Mapping[str, object], where: str, key: str) -> set[str]:
    value = raw.get(key)
    if value is None:
        return set()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{where}.{key} must be a list of strings, got {value!r}")
    return set(value)


def _refuse_present(raw: Mapping[str, object], where: str, *keys: str) -> None:
    """Each of `keys` changes what a model computes where it holds anything."""
    for key in keys:
        if raw.get(key) not in (None, {}):
            raise ConfigError(
                f"{where}.{key} is not supported, got {raw[key]!r}; quantise the original model "
                "with `baton model quantize`"
            )


@dataclass(frozen=True, slots=True)
class _Arguments:
    """The fields of quantization arguments that change a computed number."""

    strategy: str
    num_bits: int
    type: str
    group_size: int | None = None
    is_dynamic: bool = False
    is_symmetric: bool = True
    is_reordered: bool = False

    @classmethod
    def parse(cls, raw: object, where: str) -> _Arguments:
        values = _object(raw, where)
        strategy = _typed(values, where, "strategy", str)
        return cls(
            strategy=strategy,
            num_bits=_typed(values, where, "num_bits", int),
            type=_typed(values, where, "type", str),
            group_size=_typed(values, where, "group_size", int) if strategy == "group" else None,
            is_dynamic=_typed(values, where, "dynamic", bool, False),
            is_symmetric=_typed(values, where, "symmetric", bool, True),
            is_reordered=values.get("actorder") not in (None, False, "weight", "static"),
        )

    def with_group(self, group_size: int | None) -> _Arguments:
        return _Arguments(self.strategy, self.num_bits, self.type, group_size)

    def __str__(self) -> str:
        parts = [f"{self.num_bits}-bit {self.type} per {self.strategy}"]
        parts += [f"of {self.group_size}"] if self.group_size is not None else []
        parts += ["dynamic"] if self.is_dynamic else []
        parts += [] if self.is_symmetric else ["asymmetric"]
        parts += ["reordered by activation"] if self.is_reordered else []
        return " ".join(parts)


_KIND_NAMES: Mapping[type, str] = {str: "a string", int: "an integer", bool: "true or false"}
_FLOAT_WEIGHTS = _Arguments("channel", 8, "float")
_KNOWN = (
    (Scheme.FP8, _FLOAT_WEIGHTS, _Arguments("token", 8, "float", is_dynamic=True), FLOAT_FORMAT),
    (Scheme.FP8_WEIGHT, _FLOAT_WEIGHTS, None, FLOAT_FORMAT),
    (Scheme.INT8, _Arguments("channel", 8, "int"), None, PACK_FORMAT),
    (Scheme.INT4, _Arguments("group", 4, "int"), None, PACK_FORMAT),
)
