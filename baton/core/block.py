"""KV block identity: local ids, global hashes, and the hash chain.

A block's hash covers every token from the start of the sequence, and its root covers what makes
KV comparable at all (model, weights, dtype, layout) and who may share it (tenant salt). Hence
equal hashes mean equal KV bytes, on any worker; ids mean something on one worker only.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import NewType

BlockId = NewType("BlockId", int)
BlockHash = NewType("BlockHash", bytes)
Hashes = Sequence[BlockHash] | bytes
"""One after the other, or joined by `join_hashes`."""

HASH_BYTES = 16
"""128 bits: at 10^9 live blocks a collision has a chance of about 10^-21."""


HASH_SCHEME = "blake2b-128"
"""Name of what the functions below compute; changes when they do."""


def root_hash(fingerprint: str, salt: str = "") -> BlockHash:
    """The chain's origin. `fingerprint` comes from the worker's layout, `salt` from the tenant."""
    h = hashlib.blake2b(digest_size=HASH_BYTES)
    for part in (fingerprint, salt):
        data = part.encode()
        h.update(len(data).to_bytes(4, "little"))
        h.update(data)
    return BlockHash(h.digest())


def next_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """The hash of a full block holding `token_ids` that follows `parent`."""
    h = hashlib.blake2b(parent, digest_size=HASH_BYTES)
    h.update(array("I", token_ids).tobytes())
    return BlockHash(h.digest())


def chain_hashes(root: BlockHash, token_ids: Sequence[int], block_size: int) -> list[BlockHash]:
    """Hashes of all full blocks of `token_ids`; a partial last block has none."""
    packed = memoryview(array("I", token_ids).tobytes())
    stride = 4 * block_size
    hashes: list[BlockHash] = []
    parent = root
    for start in range(0, len(packed) - stride + 1, stride):
        h = hashlib.blake2b(parent, digest_size=HASH_BYTES)
        h.update(packed[start : start + stride])
        parent = BlockHash(h.digest())
        hashes.append(parent)
    return hashes


def join_hashes(hashes: Hashes) -> bytes:
    """The wire form: hashes back to back. What has that form already stays as it is."""
    return hashes if isinstance(hashes, bytes) else b"".join(hashes)


def split_hashes(data: bytes) -> list[BlockHash]:
    """Inverse of `join_hashes`. Raises ValueError when the length is not whole hashes."""
    if len(data) % HASH_BYTES:
        raise ValueError(f"{len(data)} bytes are not a whole number of {HASH_BYTES}-byte hashes")
    return [BlockHash(data[i : i + HASH_BYTES]) for i in range(0, len(data), HASH_BYTES)]


def first_hash(fingerprint: str, block_size: int) -> BlockHash:
    """The hash of the block with tokens 0, 1, 2 ...: equal exactly where blocks are named alike."""
    return next_hash(root_hash(fingerprint), range(block_size))
