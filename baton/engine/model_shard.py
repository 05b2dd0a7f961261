"""Which part of a model a tensor-parallel rank holds. Numbers only: no tensors, no files.

qkv, gate_up     rows: whole heads, and equal parts of the MLP's inner width
o, down          the matching columns; the ranks' results are summed
head             rows: ceil(vocab_size / tp_size) entries of the vocabulary on every rank; the
                 last ranks are padded with zero rows, so that every rank's logits have one
                 shape and what lies beyond vocab_size is cut after they are put together
embedding        whole, on every rank
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.engine.model_config import ModelConfig
from baton.engine.parallel import Parallel


@dataclass(frozen=True, slots=True)
class ModelShard:
    """One rank's part; slices are in units of the whole model."""

    parallel: Parallel
    query_heads: slice
    kv_heads: slice
    inner: slice
    """Of the MLP's intermediate_size."""
    vocab: slice
    """Entries of the vocabulary whose logits the rank computes, without padding."""
    vocab_rows: int
    """Rows of the rank's head, padding included; the same on every rank."""

    @property
    def num_heads(self) -> int:
        return _length(self.query_heads)

    @property
    def num_kv_heads(self) -> int:
        return _length(self.kv_heads)

    @property
    def intermediate_size(self) -> int:
        return _length(self.inner)


def shard_model(config: ModelConfig, parallel: Parallel) -> ModelShard:
    """The part of `parallel`'s rank. Raises ConfigError, with the numbers, when none is possible.

    Reads no file, so a configuration can be refused before weights are touched.
    """
    shard = ModelShard(
        parallel=parallel,
        query_heads=parallel.share(config.num_heads, "num_attention_heads"),
        kv_heads=parallel.share(config.num_kv_heads, "num_key_value_heads"),
        inner=parallel.share(config.intermediate_size, "intermediate_size"),
        vocab=_vocabulary_part(config.vocab_size, parallel),
        vocab_rows=-(-config.vocab_size // parallel.tp_size),
    )
    if config.quantization is not None:
        ranks = "" if parallel.is_single else f" of one of {parallel.tp_size} ranks"
        config.quantization.check_width(config.hidden_size, "hidden_size")
        config.quantization.check_width(
            shard.num_heads * config.head_dim, f"the attention width{ranks}"
        )
        config.quantization.check_width(shard.intermediate_size, f"the MLP width{ranks}")
    return shard


def _vocabulary_part(vocab_size: int, parallel: Parallel) -> slice:
    rows = -(-vocab_size // parallel.tp_size)
    start = min(parallel.tp_rank * rows, vocab_size)
    return slice(start, min(start + rows, vocab_size))


def _length(part: slice) -> int:
    return int(part.stop - part.start)
