"""Tensors of the Open Inference Protocol as values, and values as tensors.

Both ways of writing a tensor are read: typed contents, and raw ones (little-endian; an element of
BYTES has its length in four bytes before it).

Does not know: what the tensors of a model mean (see `open_inference_bodies`).
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from baton.core.errors import InvalidRequest
from baton.rpc.v1 import open_inference_pb2 as pb
from services.router.edge.preprocess import shorten

MAX_DIMENSIONS = 8

# Datatype -> the field of its typed contents, and its raw element for `struct`.
_DATATYPES = {
    "BOOL": ("bool_contents", "?"),
    "INT32": ("int_contents", "i"),
    "INT64": ("int64_contents", "q"),
    "UINT32": ("uint_contents", "I"),
    "UINT64": ("uint64_contents", "Q"),
    "FP32": ("fp32_contents", "f"),
    "FP64": ("fp64_contents", "d"),
    "BYTES": ("bytes_contents", ""),
}
_LENGTH = struct.Struct("<I")

Value = bool | int | float | bytes


@dataclass(frozen=True, slots=True)
class Tensor:
    """One input, its elements in row-major order."""

    name: str
    datatype: str
    values: Sequence[Value]

    def texts(self) -> list[str]:
        """Raises InvalidRequest naming the element that is no text."""
        if self.datatype != "BYTES":
            raise self.wrong("BYTES")
        texts = []
        for i, value in enumerate(self.values):
            assert isinstance(value, bytes)
            try:
                texts.append(value.decode())
            except UnicodeDecodeError as error:
                raise InvalidRequest(
                    f"{self.name}[{i}] is not UTF-8 at byte {error.start}; send text as UTF-8",
                    param=self.name,
                ) from None
        return texts

    def wrong(self, wanted: str) -> InvalidRequest:
        return InvalidRequest(
            f"{self.name} must be of datatype {wanted}, got {shorten(self.datatype)}",
            param=self.name,
        )


def read_tensors(request: pb.ModelInferRequest) -> dict[str, Tensor]:
    """The inputs by their names. Raises InvalidRequest."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest(
            f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs; "
            "send one for each, or typed contents only",
            param="raw_input_contents",
        )
    tensors: dict[str, Tensor] = {}
    for given, data in itertools.zip_longest(request.inputs, raw):
        if given.name in tensors:
            raise InvalidRequest(
                f"inputs has {shorten(given.name)} twice; send it once", param="inputs"
            )
        tensors[given.name] = _tensor(given, data)
    return tensors


def write_tensor(
    response: pb.ModelInferResponse, name: str, datatype: str, values: Sequence[Value], *, raw: bool
) -> None:
    """Add an output of one dimension; `raw`: as raw contents."""
    tensor = response.outputs.add(name=name, datatype=datatype, shape=[len(values)])
    field, code = _DATATYPES[datatype]
    if not raw:
        getattr(tensor.contents, field).extend(values)
    elif code:
        response.raw_output_contents.append(struct.pack(f"<{len(values)}{code}", *values))
    else:
        entries = [v for v in values if isinstance(v, bytes)]
        response.raw_output_contents.append(b"".join(_LENGTH.pack(len(e)) + e for e in entries))


def _tensor(given: pb.ModelInferRequest.InferInputTensor, data: bytes | None) -> Tensor:
    name, datatype = shorten(given.name), given.datatype
    if datatype not in _DATATYPES:
        raise InvalidRequest(
            f"{name} has datatype {shorten(datatype)}; use one of {', '.join(_DATATYPES)}",
            param="inputs",
        )
    shape = given.shape
    if len(shape) > MAX_DIMENSIONS or any(size < 0 for size in shape):
        raise InvalidRequest(
            f"{name} has the shape {list(shape[: MAX_DIMENSIONS + 1])}; sizes must be 0 or more, "
            f"in at most {MAX_DIMENSIONS} dimensions",
            param="inputs",
        )
    field, code = _DATATYPES[datatype]
    typed = getattr(given.contents, field)
    if data is None:
        if given.contents.ByteSize() and not typed:
            raise InvalidRequest(
                f"{name} is {datatype} but has no {field}; put its elements there", param="inputs"
            )
        values: Sequence[Value] = list(typed)
    elif given.contents.ByteSize():
        raise InvalidRequest(
            f"{name} has contents and raw_input_contents; send one of them", param="inputs"
        )
    elif code:
        values = _fixed(name, data, code)
    else:
        values = _strings(name, data)
    if len(values) != math.prod(shape):
        raise InvalidRequest(
            f"{name} has {len(values)} elements, but its shape {list(shape)} says "
            f"{math.prod(shape)}",
            param="inputs",
        )
    return Tensor(given.name, datatype, values)


def _fixed(name: str, data: bytes, code: str) -> Sequence[Value]:
    size = struct.calcsize(f"<{code}")
    if len(data) % size:
        raise InvalidRequest(
            f"the raw contents of {name} have {len(data)} bytes, which is no multiple of {size}",
            param="raw_input_contents",
        )
    return struct.unpack(f"<{len(data) // size}{code}", data)


def _strings(name: str, data: bytes) -> list[Value]:
    values: list[Value] = []
    at = 0
    while at < len(data):
        end = at + _LENGTH.size
        if end <= len(data):
            end += _LENGTH.unpack_from(data, at)[0]
        if end > len(data) or end < at + _LENGTH.size:
            raise InvalidRequest(
                f"the raw contents of {name} end within element {len(values)}; each is its length "
                "in 4 bytes, little-endian, and that many bytes",
                param="raw_input_contents",
            )
        values.append(data[at + _LENGTH.size : end])
        at = end
    return values
