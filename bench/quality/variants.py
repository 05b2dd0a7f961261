"""The rows of the quality table, and which of them to compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.core.errors import ConfigError
from baton.core.quantization import QuantizationConfig, Scheme

BASELINE = "bf16"


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of the table."""

    name: str
    config: QuantizationConfig | None = None
    dtype: str = "float32"
    is_folded: bool = True
    is_calibrated: bool = True

    @property
    def kv_cache_dtype(self) -> str:
        return "fp8" if self.config is not None and self.config.has_kv_scales else "auto"


def all_variants() -> list[Variant]:
    """The rows of the table, in its order."""
    rows = [Variant(BASELINE), Variant("bf16 arithmetic", dtype="bfloat16")]
    rows += [
        Variant(scheme.value, QuantizationConfig(scheme))
        for scheme in (Scheme.FP8, Scheme.FP8_WEIGHT, Scheme.INT8)
    ]
    rows += [Variant(f"int4 g{size}", QuantizationConfig(Scheme.INT4, size)) for size in (32, 64)]
    rows += [
        Variant("int4 g64, no text", QuantizationConfig(Scheme.INT4, 64), is_calibrated=False),
        Variant("fp8 KV", QuantizationConfig(None, has_kv_scales=True)),
        Variant("fp8 + fp8 KV", QuantizationConfig(Scheme.FP8, has_kv_scales=True)),
    ]
    for scheme, size in ((Scheme.FP8_WEIGHT, None), (Scheme.INT8, None), (Scheme.INT4, 64)):
        config = QuantizationConfig(scheme, size)
        rows.append(Variant(f"{config.name}, gains apart", config, is_folded=False))
    return rows


def chosen_variants(names: Sequence[str]) -> list[Variant]:
    """The rows called `names`, in the order of the table; all when none is named.

    Raises ConfigError for a name that no row has.
    """
    variants = all_variants()
    known = [variant.name for variant in variants]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(
            f"no row is called {unknown[0]!r}; known are {', '.join(map(repr, known))}"
        )
    return [variant for variant in variants if variant.name in names or not names]
