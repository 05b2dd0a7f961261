"""What the transports ask of the CUDA driver: a context on this thread, memory shared by handle.

Through ctypes and the driver's own library, which every GPU machine has; no tensor library. An
allocation is exported as a whole, so a handle comes with the offset of what is meant in it.

What the driver promises of a mapping: it stays valid until it is closed, and the owner must not
free the memory before. An owner whose process has died has freed it, so what is read then means
nothing; the pages themselves live until the last mapping is closed. Not known here: blocks, peers.
"""

from __future__ import annotations

import ctypes
import uuid
from dataclasses import dataclass
from typing import Any

from baton.core.errors import TransferError

LIBRARY = "libcuda.so.1"
HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1
"""CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS of <cuda.h>."""


class CudaError(TransferError):
    """The driver refused a call."""

    def __init__(self, call: str, name: str) -> None:
        super().__init__(f"{call} failed with {name}")
        self.name = name


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


@dataclass(frozen=True, slots=True)
class Allocation:
    """Where an address lies in the allocation that holds it."""

    base: int
    num_bytes: int


class CudaDriver:
    """One GPU of this process. Threads that call it need `use` first, once each."""

    def __init__(self, device_id: int, library: Any = None) -> None:
        """`library`: the driver's, None loads it. Raises TransferError where there is none."""
        self._library = library if library is not None else _load()
        self._check("cuInit", 0)
        device = ctypes.c_int()
        self._check("cuDeviceGet", ctypes.byref(device), device_id)
        self._device = device
        self._context = ctypes.c_void_p()
        # The one that the tensor library uses too; kept until the process ends, as that one is.
        self._check("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)

    def use(self) -> None:
        """Make the GPU the calling thread's."""
        self._check("cuCtxSetCurrent", self._context)

    def uuid(self) -> str:
        """Names the GPU in all processes, whatever numbers they have for it."""
        found = (ctypes.c_ubyte * 16)()
        self._check("cuDeviceGetUuid_v2", ctypes.byref(found), self._device)
        return str(uuid.UUID(bytes=bytes(found)))

    def allocation_of(self, address: int) -> Allocation:
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        self._check(
            "cuMemGetAddressRange_v2",
            ctypes.byref(base),
            ctypes.byref(size),
            ctypes.c_uint64(address),
        )
        return Allocation(base.value, size.value)

    def export(self, base: int) -> bytes:
        """A handle of the allocation that starts at `base`."""
        handle = _IpcHandle()
        self._check("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(base))
        return bytes(memoryview(handle))

    def open(self, handle: bytes) -> int:
        """Map another process's allocation; returns its address here. Opened handles count."""
        if len(handle) != HANDLE_BYTES:
            raise TransferError(f"a memory handle has {len(handle)} bytes, not {HANDLE_BYTES}")
        address = ctypes.c_uint64()
        self._check(
            "cuIpcOpenMemHandle_v2",
            ctypes.byref(address),
            _IpcHandle.from_buffer_copy(handle),
            ctypes.c_uint(_LAZY_PEER_ACCESS),
        )
        return address.value

    def close(self, address: int) -> None:
        """Undo one `open`. Nothing may be reading the memory any more."""
        self._check("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def _check(self, name: str, *arguments: object) -> None:
        code = int(getattr(self._library, name)(*arguments))
        if code:
            raise CudaError(name, self._error_name(code))

    def _error_name(self, code: int) -> str:
        text = ctypes.c_char_p()
        if self._library.cuGetErrorName(ctypes.c_int(code), ctypes.byref(text)) or not text.value:
            return f"error {code}"
        return text.value.decode()


def _load() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise TransferError(
            f"the CUDA driver {LIBRARY} cannot be loaded; "
            "make the driver's libraries visible in this container"
        ) from error
