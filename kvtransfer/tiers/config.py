"""Settings of the tiers of one worker. Checked against the block size when the tiers are built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from baton.core.errors import ConfigError

_POSITIVE = (
    "save_bytes_per_second",
    "disk_bytes_per_second",
    "max_piece_bytes",
    "restore_timeout_s",
    "retry_s",
    "max_scan_s",
)


@dataclass(frozen=True, slots=True)
class TierConfig:
    """Host memory and a directory for blocks that the pool has no room for."""

    host_bytes: int = 0
    """Host memory for blocks, beside the pool; becomes resident as it fills. 0: no tiers."""
    disk_bytes: int = 0
    """Bound on the files of this worker. 0: no disk tier. Filled from the host tier's cold end."""
    disk_path: Path | None = None
    """Directory of the disk tier, best on a local NVMe drive. Workers that share it take a
    subdirectory each; a restarted one finds its blocks again."""
    save_below_free_ratio: float = 0.2
    """Cached blocks are copied to the host tier while fewer of the pool's blocks than this share
    are empty: above it nothing is about to be evicted."""
    save_bytes_per_second: int = 1 << 30
    """Pace of copies from the pool. A copy reads and writes memory, so the default takes at most
    2 GiB/s of it: about a twentieth of what decode has on a CPU. A GPU's link carries 48 GB/s in
    blocks of 8 MiB beside the model's work; where prompts come fast, raise it there."""
    disk_bytes_per_second: int = 256 << 20
    """Pace of writes to the disk tier: kind to the drive's endurance and to its other users."""
    max_piece_bytes: int = 8 << 20
    """Copied in one go, to or from the pool: bounds how long blocks are leased for saving, and how
    late a restore that is given up stops."""
    restore_timeout_s: float = 10.0
    """A restore that takes longer ends with the blocks it has by then."""
    flush_timeout_s: float = 2.0
    """How long a stopping worker may copy host blocks to the disk tier, most recent first."""
    retry_s: float = 10.0
    """Pause of the disk tier after an error, before it is tried again."""
    max_scan_s: float = 30.0
    """Reading the index of an existing directory at start, in the background. What has not been
    read by then is forgotten."""
    check_host_memory: bool = False
    """Checksums for host blocks too, verified when they are restored."""

    def __post_init__(self) -> None:
        for name in ("host_bytes", "disk_bytes", "flush_timeout_s"):
            value = getattr(self, name)
            if value < 0:
                raise ConfigError(f"tiers.{name} must not be negative, got {value}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value <= 0:
                raise ConfigError(f"tiers.{name} must be positive, got {value}")
        if not 0 <= self.save_below_free_ratio <= 1:
            raise ConfigError(
                "tiers.save_below_free_ratio must be between 0 and 1, "
                f"got {self.save_below_free_ratio}"
            )
        if self.disk_bytes and not self.host_bytes:
            raise ConfigError(
                f"tiers.disk_bytes is {self.disk_bytes} but tiers.host_bytes is 0: the disk tier "
                "is filled through the host tier; give it memory for some blocks"
            )
        if self.disk_bytes and self.disk_path is None:
            raise ConfigError(
                f"tiers.disk_bytes is {self.disk_bytes} without a directory; set tiers.disk_path"
            )
        if self.disk_path is not None and not self.disk_bytes:
            raise ConfigError("tiers.disk_path is set but tiers.disk_bytes is 0; say how much")

    @property
    def is_enabled(self) -> bool:
        return self.host_bytes > 0
