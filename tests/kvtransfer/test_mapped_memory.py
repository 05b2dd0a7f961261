"""Sharing device memory by handle, against a driver that is written here: no GPU is needed."""

from __future__ import annotations

import ctypes
import uuid
from dataclasses import dataclass, field
from typing import Any

import pytest

from baton.core.errors import IncompatiblePeer, TransferError
from kvtransfer import cuda_driver
from kvtransfer.cuda_driver import HANDLE_BYTES, CudaDriver, CudaError
from kvtransfer.mapped_memory import CudaMapper
from kvtransfer.metadata import MappedEndpoint

BASE, SIZE = 0x7F00_0000_0000, 1 << 30
MAPPED = 0x7E00_0000_0000
HANDLE = bytes(range(64))
INVALID_VALUE = 1


@dataclass
class FakeLibrary:
    """The calls of libcuda.so.1 that are made, with one allocation to export and one to map."""

    calls: list[str] = field(default_factory=list)
    failing: dict[str, int] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name in self.failing:
                return self.failing[name]
            getattr(self, f"_{name}", lambda *_: None)(*arguments)
            return 0

        if not name.startswith("cu"):
            raise AttributeError(name)
        return call

    def _cuMemGetAddressRange_v2(self, base: Any, size: Any, address: Any) -> None:
        start = BASE if BASE <= address.value < BASE + SIZE else MAPPED
        assert start <= address.value < start + SIZE
        base._obj.value, size._obj.value = start, SIZE

    def _cuIpcGetMemHandle(self, handle: Any, address: Any) -> None:
        assert address.value == BASE
        ctypes.memmove(ctypes.byref(handle._obj), HANDLE, HANDLE_BYTES)

    def _cuIpcOpenMemHandle_v2(self, address: Any, handle: Any, flags: Any) -> None:
        assert bytes(memoryview(handle)) == HANDLE
        assert flags.value == 1
        address._obj.value = MAPPED

    def _cuDeviceGetUuid_v2(self, found: Any, device: Any) -> None:
        ctypes.memmove(ctypes.byref(found._obj), uuid.UUID(int=7).bytes, 16)

    def _cuGetErrorName(self, code: Any, text: Any) -> None:
        text._obj.value = b"CUDA_ERROR_INVALID_VALUE"


@pytest.fixture
def library() -> FakeLibrary:
    return FakeLibrary()


@pytest.fixture
def mapper(library: FakeLibrary) -> CudaMapper:
    return CudaMapper(1, lambda device_id: CudaDriver(device_id, library))


def test_a_pool_is_exported_with_its_place_in_the_allocation(mapper, library):
    endpoint = mapper.export(BASE + 4096, 1 << 20)
    assert endpoint == MappedEndpoint(HANDLE, str(uuid.UUID(int=7)), 4096, 1 << 20)
    assert library.calls.count("cuDevicePrimaryCtxRetain") == 1
    assert library.calls.index("cuCtxSetCurrent") < library.calls.index("cuIpcGetMemHandle")


def test_a_peer_is_mapped_and_unmapped_once(mapper, library):
    mapping = mapper.open(MappedEndpoint(HANDLE, "x", 4096, 1 << 20), 1 << 20)
    assert mapping.address == MAPPED + 4096
    mapping.close()
    assert library.calls.count("cuIpcCloseMemHandle") == 1


def test_a_pool_that_leaves_the_mapped_memory_is_refused_and_unmapped(mapper, library):
    with pytest.raises(IncompatiblePeer, match="does not lie in the mapped 1073741824 bytes"):
        mapper.open(MappedEndpoint(HANDLE, "x", SIZE - 10, 11), 11)
    assert library.calls.count("cuIpcCloseMemHandle") == 1


def test_memory_that_cannot_be_shared_says_what_it_may_come_from(mapper, library):
    library.failing["cuIpcGetMemHandle"] = INVALID_VALUE
    with pytest.raises(TransferError, match=r"INVALID_VALUE.*expandable segments"):
        mapper.export(BASE, 1 << 20)


def test_a_gpu_that_cannot_be_mapped_is_an_incompatible_peer(mapper, library):
    library.failing["cuIpcOpenMemHandle_v2"] = INVALID_VALUE
    with pytest.raises(IncompatiblePeer, match=r"memory of GPU x cannot be mapped .*peer access"):
        mapper.open(MappedEndpoint(HANDLE, "x", 0, 10), 10)


@pytest.mark.parametrize("handle", [b"", HANDLE[:-1], HANDLE + b"x"])
def test_handles_of_a_wrong_length_never_reach_the_driver(mapper, library, handle):
    with pytest.raises(TransferError, match=f"a memory handle has {len(handle)} bytes, not 64"):
        mapper.open(MappedEndpoint(handle, "x", 0, 10), 10)
    assert "cuIpcOpenMemHandle_v2" not in library.calls


def test_unmapping_on_a_broken_gpu_is_logged(mapper, library, caplog):
    mapping = mapper.open(MappedEndpoint(HANDLE, "x", 0, 10), 10)
    library.failing["cuIpcCloseMemHandle"] = INVALID_VALUE
    mapping.close()
    assert "a peer's memory stays mapped" in caplog.text


def test_errors_without_a_name_show_their_number(library):
    driver = CudaDriver(0, library)
    library.failing |= {"cuCtxSetCurrent": 999, "cuGetErrorName": 1}
    with pytest.raises(CudaError, match="cuCtxSetCurrent failed with error 999"):
        driver.use()


def test_a_machine_without_a_driver_says_so(monkeypatch):
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libno-such-driver.so.1")
    with pytest.raises(TransferError, match=r"libno-such-driver.so.1 cannot be loaded"):
        CudaMapper(0).use()
