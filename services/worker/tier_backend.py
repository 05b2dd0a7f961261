"""Builds the tiers of one worker over its pool. Starts nothing.

Not known here: how the tiers are used.
"""

from __future__ import annotations

from baton.core.clock import MonotonicClock
from baton.core.errors import ConfigError
from kvtransfer.tiers.config import TierConfig
from kvtransfer.tiers.copier import BlockCopier, HostCopier
from kvtransfer.tiers.tiers import build_tiers
from kvtransfer.transport import PoolRegion
from services.worker.tiering import Tiering, UnsavedBlocks


def build_tiering(config: TierConfig, region: PoolRegion, engine: UnsavedBlocks) -> Tiering | None:
    """None when no tiers are wanted.

    Raises ConfigError for tiers too small for a block, and where each rank has a pool.
    """
    if region.tp_size > 1 and config.is_enabled:
        raise ConfigError(
            f"tiers.host_bytes is {config.host_bytes} and each of {region.tp_size} ranks has a KV "
            "pool: each block lies in parts in several, which the tiers do not collect; set it to 0"
        )
    tiers = build_tiers(config, region.layout, clock=MonotonicClock())
    if tiers is None:
        return None
    return Tiering(tiers, _copier(region), engine, config=config)


def _copier(region: PoolRegion) -> BlockCopier:
    if region.device_id is None:
        return HostCopier(region)
    # The tensor library is loaded by then, by the engine.
    from baton.engine.gpu.block_copier import GpuBlockCopier

    return GpuBlockCopier(
        region.address,
        num_blocks=region.num_blocks,
        block_bytes=region.layout.block_bytes,
        device_id=region.device_id,
    )
