"""Which group sizes a model can be divided into. Numbers only."""

from __future__ import annotations

import math

from baton.core.errors import ConfigError
from baton.engine.model_config import ModelConfig
from baton.engine.model_shard import shard_model
from baton.engine.parallel import Parallel


def check_tp_size(config: ModelConfig, tp_size: int) -> None:
    """Raises ConfigError, with the sizes that are possible, when `tp_size` is none of them."""
    divided = {
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
    }
    for name, size in divided.items():
        if size % tp_size:
            raise ConfigError(
                f"tp_size {tp_size} does not divide {name} {size}; "
                f"take {_alternatives(math.gcd(*divided.values()))}"
            )
    shard_model(config, Parallel(0, tp_size))


def _alternatives(size: int) -> str:
    """The divisors of `size` in words."""
    *others, last = (str(n) for n in range(1, size + 1) if size % n == 0)
    return f"{', '.join(others)} or {last}" if others else last
