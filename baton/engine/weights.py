"""Load a rank's part of a model folder: config.json, weights, KV scales, identity.

Not known here: how tensors become layers (`weight_assembler.py`), KV pools.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, TypeVar, overload

import torch
from torch import Tensor

from baton.core.errors import ConfigError
from baton.core.kv_layout import KvLayout
from baton.engine.checkpoint import (
    Checkpoint,
    LoadProgress,
    TensorSource,
    model_id,
    revised_id,
    weight_files,
)
from baton.engine.config import EngineConfig, LoadFormat
from baton.engine.dummy_weights import DummyCheckpoint, dummy_model_id
from baton.engine.kv_cache import KvScales
from baton.engine.layers.linear import CpuLinears, Linear, LinearFactory
from baton.engine.model_config import ModelConfig, load_model_config
from baton.engine.model_shard import ModelShard, shard_model
from baton.engine.models.llama import LlamaWeights
from baton.engine.parallel import SINGLE, Parallel
from baton.engine.weight_assembler import WeightAssembler

KV_DTYPE_FP8 = "float8_e4m3fn"

L = TypeVar("L")


@dataclass(frozen=True, slots=True)
class LoadedModel(Generic[L]):
    """One rank's part of a model, ready to run, still without a KV pool."""

    model_config: ModelConfig
    weights: LlamaWeights[L]
    model_id: str
    """The same on every rank."""
    dtype: str
    """Of weights and activations."""
    kv_dtype: str
    """Of the KV pool."""
    max_model_len: int
    """Tokens of prompt and output together."""
    device: torch.device
    shard: ModelShard
    k_scale: Tensor
    """A stored key times this is the key: float32 [num_layers, num_kv_heads of the rank]."""
    v_scale: Tensor

    def layout(self, block_size: int) -> KvLayout:
        """The KV layout of the whole model, which peers compare."""
        return KvLayout(
            model_id=self.model_id,
            num_layers=self.model_config.num_layers,
            num_kv_heads=self.model_config.num_kv_heads,
            head_dim=self.model_config.head_dim,
            block_size=block_size,
            dtype=self.kv_dtype,
        )

    def pool_scales(self) -> KvScales | None:
        """What the rank's pool needs besides memory when it is one of e4m3."""
        if self.kv_dtype != KV_DTYPE_FP8:
            return None
        return KvScales(self.k_scale, self.v_scale, getattr(torch, self.dtype))

    def rank_layout(self, block_size: int) -> KvLayout:
        """The layout of the rank's own pool: the same with its KV heads alone."""
        return replace(self.layout(block_size), num_kv_heads=self.shard.num_kv_heads)


@overload
def load_model(
    config: EngineConfig,
    *,
    parallel: Parallel = SINGLE,
    device: torch.device | None = None,
    on_progress: LoadProgress | None = None,
) -> LoadedModel[Linear]: ...


@overload
def load_model(
    config: EngineConfig,
    *,
    parallel: Parallel = SINGLE,
    device: torch.device | None = None,
    linears: LinearFactory[L],
    on_progress: LoadProgress | None = None,
) -> LoadedModel[L]: ...


def load_model(
    config: EngineConfig,
    *,
    parallel: Parallel = SINGLE,
    device: torch.device | None = None,
    linears: LinearFactory[L] | None = None,
    on_progress: LoadProgress | None = None,
) -> LoadedModel[L] | LoadedModel[Linear]:
    """Read config.json and `parallel`'s part of the weights of `config.model_path`.

    `linears` defaults to those of the CPU engine. Raises ConfigError, for what config.json alone
    forbids before any weight is read.
    """
    if linears is None:
        cpu = CpuLinears(getattr(torch, config.dtype))
        return _load(config, parallel, device or torch.device("cpu"), cpu, on_progress)
    return _load(config, parallel, device or torch.device("cpu"), linears, on_progress)


def _load(
    config: EngineConfig,
    parallel: Parallel,
    device: torch.device,
    linears: LinearFactory[L],
    on_progress: LoadProgress | None,
) -> LoadedModel[L]:
    model_config = load_model_config(config.model_path)
    limit = model_config.max_position_embeddings
    if config.max_model_len is not None and not 1 <= config.max_model_len <= limit:
        raise ConfigError(
            f"max_model_len {config.max_model_len} is outside 1..{limit}, the model's own limit"
        )
    shard = shard_model(model_config, parallel)
    dtype: torch.dtype = getattr(torch, config.dtype)
    source: TensorSource
    if config.load_format is LoadFormat.DUMMY:
        identity = dummy_model_id(config.model_path)
        source = DummyCheckpoint(model_config, device, dtype, on_progress)
    else:
        files = weight_files(config.model_path)
        identity = model_id(config.model_path, files)
        source = Checkpoint(files, on_progress)
    if config.revision:
        identity = revised_id(identity, config.revision)
    with torch.inference_mode():
        assembler = WeightAssembler(model_config, shard, source, dtype, device, linears)
        k_scale, v_scale = assembler.kv_scales()
        weights = assembler.assemble()
    return LoadedModel(
        model_config=model_config,
        weights=weights,
        model_id=identity,
        dtype=config.dtype,
        kv_dtype=KV_DTYPE_FP8 if config.kv_cache_dtype == "fp8" else config.dtype,
        max_model_len=config.max_model_len or limit,
        device=device,
        shard=shard,
        k_scale=k_scale,
        v_scale=v_scale,
    )
