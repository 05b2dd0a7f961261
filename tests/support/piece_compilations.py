"""Names of the compilations that reads of many shapes between one pair of pools take; a script.

    piece_compilations.py FOLDER

Run without TRITON_INTERPRET. FOLDER is not used.
"""

from __future__ import annotations

import torch

from hopper_compiler import recording_compilations
from kernels.piece_copy import CompiledPieces, copy_pieces, make_side


def main() -> None:
    offsets = torch.zeros(1, 1, dtype=torch.int64)
    sizes = {"block_bytes": 1 << 20, "piece_bytes": 1 << 20, "device": torch.device("cpu")}
    side = make_side(1 << 45, offsets, **sizes)  # type: ignore[arg-type]
    units = torch.empty(64, dtype=torch.int32)
    names: list[str] = []
    with recording_compilations(names):
        CompiledPieces(side, side, max_programs=1)
        for count in (1, 15, 16, 17, 48):
            copy_pieces(side, side, src_units=units[:count], dst_units=units[1 : count + 1])
    print(*names, sep="\n")


if __name__ == "__main__":
    main()
