"""Books of keys that are merged in any order."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from baton.core.errors import Overloaded
from services.router.shared import key_book
from services.router.shared.key_book import KeyBook
from services.router.shared.state import TenantRecord

A, B = TenantRecord("a"), TenantRecord("b")


def test_the_later_change_wins_in_any_order_of_merging() -> None:
    clock = itertools.count(1)
    source = KeyBook(lambda: next(clock))
    states = [
        source.write("k", A), source.write("k", B), source.revoke("k"), source.write("k", A),
        source.revoke("k"),
    ]  # fmt: skip
    for order in itertools.permutations(states):
        book = KeyBook()
        for state in order:
            assert state is not None
            book.merge({"k": state})
        assert book.read("k") is None and book.live() == {}


def test_a_clock_that_stands_still_or_goes_back_loses_no_change() -> None:
    book = KeyBook(lambda: 5)
    first, second, third = book.write("k", A), book.revoke("k"), book.write("k", B)
    assert second is not None and first.serial < second.serial < third.serial
    assert book.read("k") == B


def test_version_shows_every_change_and_no_other() -> None:
    book = KeyBook()
    book.write("k", A)
    version, states = book.version, book.states()
    book.merge(states)
    assert book.revoke("unknown") is None and book.version == version
    book.revoke("k")
    assert book.version > version


def test_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_book, "MAX_KEYS", 3)
    monkeypatch.setattr(key_book, "MAX_REVOKED", 2)
    book = KeyBook()
    for key in "abc":
        book.write(key, A)
    with pytest.raises(Overloaded, match="3 keys"):
        book.write("d", A)
    for key in "abc":
        book.revoke(key)
    assert set(book.states()) == {"b", "c"}


def test_a_merge_keeps_the_last_revocations_and_looks_for_them_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = []

    class Counting(dict[str, key_book.KeyState]):
        def __iter__(self) -> Iterator[str]:
            looks.append(None)
            return super().__iter__()

    monkeypatch.setattr(key_book, "MAX_REVOKED", 50)
    book = KeyBook()
    book._revoked = Counting()
    states = [(f"k{serial}", key_book.KeyState(serial, None)) for serial in range(1, 201)]
    random.Random(1).shuffle(states)
    book.merge(dict(states))
    assert set(book.states()) == {f"k{serial}" for serial in range(151, 201)}
    assert len(looks) < 10


@pytest.mark.parametrize("seed", range(3))
def test_copies_that_merge_now_and_then_come_to_agree(seed: int) -> None:
    rng, clock = random.Random(seed), itertools.count(1)
    books = [KeyBook(lambda: next(clock)) for _ in range(4)]
    for _ in range(2000):
        book, key = rng.choice(books), rng.choice("abcdef")
        if rng.random() < 0.4:
            book.write(key, rng.choice([A, B]))
        elif rng.random() < 0.5:
            book.revoke(key)
        else:
            book.merge(rng.choice(books).states())
    for book, other in itertools.product(books, repeat=2):
        book.merge(other.states())
    assert len({tuple(sorted(book.live().items(), key=str)) for book in books}) == 1
