"""Compiles kernels for Hopper (sm_90a) on a machine without a GPU, by calling their launchers.

A stand-in driver names the target and every launch is turned into Triton's own warm-up, which
compiles and does not run. What the assembler says of registers, spills and tensor-core use is
read from the cubin with the tools that come with Triton.

Works only where the kernels are not interpreted: run in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
HOPPER = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True, slots=True)
class KernelReport:
    """One compiled kernel, as the assembler left it."""

    name: str
    constants: dict[str, Any]
    num_warps: int
    num_registers: int
    shared_bytes: int
    """Static and dynamic shared memory of one program; Hopper has 227 KiB."""
    spill_bytes: int
    """Local memory a thread; 0 when nothing spills."""
    num_tensor_core_ops: int
    """HGMMA and QGMMA (warp-group), in the SASS."""
    num_legacy_tensor_core_ops: int
    """HMMA: the slower path on Hopper."""
    num_bulk_copies: int
    """UTMALDG: loads by the bulk tensor copy engine."""
    sass: str

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.num_warps} warps, {self.num_registers} registers, "
            f"{self.shared_bytes} B shared, {self.spill_bytes} B spilled, "
            f"{self.num_tensor_core_ops} GMMA, {self.num_legacy_tensor_core_ops} HMMA, "
            f"{self.num_bulk_copies} TMA  {self.constants}"
        )


class _HopperDriver:
    """Just enough of a driver for warm-up: a target, and a device that does not exist."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_for_hopper(call: Callable[[], object]) -> list[KernelReport]:
    """Run `call`, which calls launchers on CPU tensors, and report every kernel it would launch.

    Each distinct compilation is reported once, in order of first launch. The tensors' contents
    are neither read nor written.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("compile in a process without TRITON_INTERPRET=1")
    reports: list[KernelReport] = []
    with _warming_up(lambda function, kernel: reports.append(_report(function, kernel))):
        call()
    return reports


@contextmanager
def recording_compilations(names: list[str]) -> Iterator[None]:
    """Launches inside are compiled, not run; each new compilation appends its kernel's name."""
    with _warming_up(lambda function, kernel: names.append(function.__name__)):
        yield


@contextmanager
def _warming_up(on_new: Callable[[JITFunction, Any], None]) -> Iterator[None]:
    launch = JITFunction.run
    seen: set[str] = set()

    def warm_up(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            on_new(self, kernel)
        return kernel

    before = driver._active
    driver.set_active(_HopperDriver())
    try:
        with (
            mock.patch.object(JITFunction, "run", warm_up),
            mock.patch("kernels.platform.runs_triton", return_value=True),
            _everywhere("runs_triton", lambda x: True),
        ):
            yield
    finally:
        driver._active = before


@contextmanager
def _everywhere(name: str, value: Any) -> Iterator[None]:
    """Replace `name` in every loaded module of `kernels` that imported it."""
    import sys

    changed = []
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("kernels.") and name in vars(module):
            changed.append((module, vars(module)[name]))
            setattr(module, name, value)
    try:
        yield
    finally:
        for module, old in changed:
            setattr(module, name, old)


def _report(function: JITFunction, kernel: Any) -> KernelReport:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("cuobjdump", "-sass", file.name)
    values = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage))
    names = function.arg_names
    constants = {names[key[0]]: value for key, value in kernel.src.constants.items()}
    return KernelReport(
        name=function.__name__,
        constants={k: v for k, v in constants.items() if k.isupper()},
        num_warps=kernel.metadata.num_warps,
        num_registers=int(values["REG"]),
        shared_bytes=int(kernel.metadata.shared),
        spill_bytes=int(values["STACK"]) + int(values["LOCAL"]),
        num_tensor_core_ops=len(re.findall(r"\b[HQI]GMMA", sass)),
        num_legacy_tensor_core_ops=len(re.findall(r"\b[HQI]MMA", sass)),
        num_bulk_copies=len(re.findall(r"\bUTMALDG", sass)),
        sass=sass,
    )


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run(
        [str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout
