"""The shape of a KV pool, as numbers only.

    pool[num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim]      (K and V in the `2`)

One head of one block is contiguous over all layers, so between equal layouts a block is one
descriptor, and a range of heads is one contiguous slice of each block.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass

from baton.core.errors import ConfigError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of weights and activations."""
KV_DTYPE_BYTES = {**DTYPE_BYTES, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Everything two workers must agree on before one may read the other's blocks."""

    model_id: str
    """Digest of the model's config and weights, so different revisions never share KV."""
    num_layers: int
    num_kv_heads: int
    """KV heads of the whole model, not of one tensor-parallel rank."""
    head_dim: int
    block_size: int
    """Tokens in one block."""
    dtype: str

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "block_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in KV_DTYPE_BYTES:
            raise ConfigError(f"dtype {self.dtype!r} is not one of {sorted(KV_DTYPE_BYTES)}")

    @property
    def head_bytes(self) -> int:
        """Bytes of one head of one block, over all layers, K and V."""
        return self.num_layers * 2 * self.block_size * self.head_dim * KV_DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.num_kv_heads * self.head_bytes

    @property
    def token_bytes(self) -> int:
        return self.block_bytes // self.block_size

    def pool_shape(self, num_blocks: int) -> tuple[int, int, int, int, int, int]:
        return (
            num_blocks,
            self.num_kv_heads,
            self.num_layers,
            2,
            self.block_size,
            self.head_dim,
        )

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def num_blocks_in(self, kv_cache_bytes: int) -> int:
        """Blocks of a pool of that size. Raises ConfigError when not even one fits."""
        if kv_cache_bytes < self.block_bytes:
            raise ConfigError(
                f"kv_cache_bytes {kv_cache_bytes} is below one block of {self.block_bytes} bytes "
                f"({self.block_size} tokens); raise it"
            )
        return kv_cache_bytes // self.block_bytes

    @property
    def fingerprint(self) -> str:
        """16 hex digits; equal exactly when blocks are interchangeable byte for byte."""
        return _fingerprint(self)

    def difference(self, other: KvLayout) -> str:
        """A readable list of the fields that differ, empty when compatible."""
        mine, theirs = asdict(self), asdict(other)
        return ", ".join(
            f"{name}: {mine[name]} here, {theirs[name]} there"
            for name in mine
            if mine[name] != theirs[name]
        )


@functools.lru_cache(maxsize=64)
def _fingerprint(layout: KvLayout) -> str:
    """Kept, since a router asks once a request; its workers have a layout or two."""
    text = json.dumps(asdict(layout), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
