"""Fills three gaps of Triton's interpreter, which the kernels' tests meet.

It keeps scalars as arrays of one element, which from NumPy 2.4 on are no integers and so no loop
bounds; it keeps bfloat16 as bit patterns, which its matrix product multiplies as integers; and it
rounds float32 to bfloat16 by cutting, to e4m3 without carrying into the exponent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch


def complete_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run-time loop bounds, bfloat16 products and rounding, for the life of `monkeypatch`."""
    # Whether kernels are interpreted is settled when triton is imported, after pytest's set-up.
    import triton

    if not triton.knobs.runtime.interpret:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor
    create_dot = interpreter.InterpreterBuilder.create_dot
    convert_float = interpreter._convert_float
    rounded_by_torch = {
        tl.bfloat16: (torch.bfloat16, torch.uint16),
        tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
    }

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        data = (operand.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widened(a), widened(b), *rest)

    def convert(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source != tl.float32 or target not in rounded_by_torch:
            return convert_float(data, source, target, rounding_mode)
        dtype, bits = rounded_by_torch[target]
        values = torch.from_numpy(np.array(data, dtype=np.float32))
        return values.to(dtype).view(bits).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
