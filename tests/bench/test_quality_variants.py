"""Rows of the quality table are chosen by name."""

from __future__ import annotations

import pytest

from baton.core.errors import ConfigError
from bench.quality.variants import BASELINE, all_variants, chosen_variants


def test_all_rows_when_none_is_named() -> None:
    assert chosen_variants([]) == all_variants()
    assert chosen_variants([])[0].name == BASELINE


def test_every_row_can_be_named() -> None:
    for variant in all_variants():
        assert chosen_variants([variant.name]) == [variant]


def test_rows_keep_the_order_of_the_table() -> None:
    assert [v.name for v in chosen_variants(["int8", "fp8"])] == ["fp8", "int8"]


def test_unknown_row_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'int3'.*known are .*'fp8'.*'int4 g64, no text'"):
        chosen_variants(["fp8", "int3"])
