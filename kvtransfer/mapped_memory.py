"""Device memory of another process mapped into ours, by handles of the CUDA driver.

Not known here: blocks, what reads the memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from baton.core.errors import IncompatiblePeer, TransferError
from kvtransfer.cuda_driver import CudaDriver, CudaError
from kvtransfer.metadata import MappedEndpoint

logger = logging.getLogger(__name__)


class Mapping(Protocol):
    """A peer's pool in our address space."""

    @property
    def address(self) -> int:
        """Of the pool's first byte."""
        ...

    def close(self) -> None:
        """Once, when nothing reads it any more. Raises nothing."""
        ...


class MemoryMapper(Protocol):
    """Any thread may call it."""

    def use(self) -> None:
        """To be called first on a thread that copies. Raises TransferError."""
        ...

    def export(self, address: int, num_bytes: int) -> MappedEndpoint:
        """How others may map that memory of ours. Raises TransferError."""
        ...

    def open(self, endpoint: MappedEndpoint, num_bytes: int) -> Mapping:
        """Map `num_bytes` of a peer's pool. Raises IncompatiblePeer (reason and fix)."""
        ...


class CudaMapper:
    """Implements `MemoryMapper` for one GPU of this process."""

    def __init__(
        self, device_id: int, make_driver: Callable[[int], CudaDriver] = CudaDriver
    ) -> None:
        self._device_id = device_id
        self._make_driver = make_driver
        self._driver: CudaDriver | None = None

    def use(self) -> None:
        self._usable()

    def export(self, address: int, num_bytes: int) -> MappedEndpoint:
        driver = self._usable()
        allocation = driver.allocation_of(address)
        try:
            handle = driver.export(allocation.base)
        except CudaError as error:
            raise TransferError(
                f"the KV pool's memory cannot be shared with other processes ({error.name}); it "
                "must not come from expandable segments (PYTORCH_CUDA_ALLOC_CONF)"
            ) from None
        return MappedEndpoint(
            handle=handle,
            device_uuid=driver.uuid(),
            pool_offset=address - allocation.base,
            num_bytes=num_bytes,
        )

    def open(self, endpoint: MappedEndpoint, num_bytes: int) -> Mapping:
        driver = self._usable()
        try:
            base = driver.open(endpoint.handle)
        except CudaError as error:
            raise IncompatiblePeer(
                f"memory of GPU {endpoint.device_uuid} cannot be mapped ({error.name}); the two "
                "GPUs need peer access (nvidia-smi topo -p2p r)"
            ) from None
        mapping = _CudaMapping(driver, base, endpoint.pool_offset)
        try:
            size = driver.allocation_of(base).num_bytes
            if endpoint.pool_offset + num_bytes > size:
                raise IncompatiblePeer(
                    f"the pool of {num_bytes} bytes at {endpoint.pool_offset} does not lie in the "
                    f"mapped {size} bytes"
                )
        except BaseException:
            mapping.close()
            raise
        return mapping

    def _usable(self) -> CudaDriver:
        if self._driver is None:
            self._driver = self._make_driver(self._device_id)
        self._driver.use()
        return self._driver


class _CudaMapping:
    def __init__(self, driver: CudaDriver, base: int, offset: int) -> None:
        self._driver = driver
        self._base = base
        self.address = base + offset

    def close(self) -> None:
        try:
            self._driver.use()
            self._driver.close(self._base)
        except CudaError as error:
            # The GPU is beyond use; the mapping ends with the process.
            logger.warning("a peer's memory stays mapped: %s", error)
