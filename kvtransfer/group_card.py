"""The card of a worker: its ranks' own cards, each signed by itself. Pure.

    one pool            the card
    a pool per rank     MAGIC, number of cards (2 bytes), then per rank: length (4 bytes), card

The frame is not signed: every card inside says which rank of how many it is, of which worker and
epoch, and for which nonce, so cards can be neither left out nor mixed.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from baton.core.errors import BadPeerCard
from kvtransfer.metadata import MAX_CARD_BYTES, PeerCard, open_card
from kvtransfer.plan import MAX_TP_SIZE

MAGIC = b"baton group card"
"""A single card starts with a signature, which is never this."""
_COUNT = struct.Struct(">H")
_LENGTH = struct.Struct(">I")


def join_cards(cards: Sequence[bytes]) -> bytes:
    """What peers are given; `cards` in the order of the ranks."""
    if len(cards) == 1:
        return cards[0]
    parts = [MAGIC, _COUNT.pack(len(cards))]
    for card in cards:
        parts += [_LENGTH.pack(len(card)), card]
    return b"".join(parts)


def split_cards(wire: bytes) -> list[bytes]:
    """The cards, none of them opened. Raises BadPeerCard."""
    if not wire.startswith(MAGIC):
        return [wire]
    try:
        (count,) = _COUNT.unpack_from(wire, len(MAGIC))
        if not 2 <= count <= MAX_TP_SIZE:
            raise BadPeerCard(f"group card of {count} ranks; 2 to {MAX_TP_SIZE} are allowed")
        position = len(MAGIC) + _COUNT.size
        cards = []
        for _ in range(count):
            (length,) = _LENGTH.unpack_from(wire, position)
            position += _LENGTH.size
            if length > min(MAX_CARD_BYTES, len(wire) - position):
                raise BadPeerCard(f"group card holds a card of {length} bytes")
            cards.append(wire[position : position + length])
            position += length
    except struct.error:
        raise BadPeerCard("group card is cut short") from None
    if position != len(wire):
        raise BadPeerCard(f"group card has {len(wire) - position} bytes too many")
    return cards


def open_cards(wire: bytes, secret: bytes, *, now_s: float, nonce: bytes) -> list[PeerCard]:
    """Verify the cards of all ranks of a worker, made for `nonce`; raises as `open_card`."""
    cards = [open_card(card, secret, now_s=now_s, nonce=nonce) for card in split_cards(wire)]
    check_group(cards)
    return cards


def check_group(cards: Sequence[PeerCard]) -> None:
    """Raises BadPeerCard unless these are all ranks of one worker, in order."""
    first = cards[0]
    for rank, card in enumerate(cards):
        if (card.tp_rank, card.tp_size) != (rank, len(cards)):
            raise BadPeerCard(
                f"card {rank} of {len(cards)} from {first.worker_id} is of rank {card.tp_rank} of "
                f"{card.tp_size}"
            )
        if (card.identity, card.layout) != (first.identity, first.layout):
            raise BadPeerCard(f"the cards from {first.worker_id} are not of one worker")
        sizes = (card.num_blocks, card.num_scratch_blocks)
        if sizes != (first.num_blocks, first.num_scratch_blocks):
            raise BadPeerCard(
                f"the ranks of {first.worker_id} have pools of different sizes: {sizes[0]} and "
                f"{first.num_blocks} blocks"
            )
