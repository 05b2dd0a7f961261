"""The grammar benchmark counts what it should, on a model of random weights."""

from __future__ import annotations

import pytest

import tiny_llama
from bench.grammar import SCHEMAS, Driver, fits, measure_cost, measure_validity


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    folder = tiny_llama.write_checkpoint(tmp_path_factory.mktemp("m") / "tiny", num_hidden_layers=1)
    tiny_llama.write_byte_tokenizer(folder)
    return Driver(folder, batch=3, threads=1)


def test_cost_is_that_of_full_batches(driver: Driver) -> None:
    cost = measure_cost(driver, num_steps=2, num_rounds=2)
    assert len(cost["free_s"]) == len(cost["masked_s"]) == 2
    assert cost["overhead"] == pytest.approx(
        1 - cost["masked_tokens_per_s"] / cost["free_tokens_per_s"]
    )
    assert driver.engine.is_empty


def test_only_cut_outputs_do_not_fit(driver: Driver) -> None:
    found = measure_validity(driver, 5)
    assert sum(found["by_schema"].values()) == 5
    assert all(misfit["finish_reason"] == "length" for misfit in found["misfits"])
    assert driver.engine.is_empty


def test_what_fits() -> None:
    assert fits('{"name": "A", "age": 3, "role": null}', SCHEMAS["flat"])
    for text in ("", "{", '{"name": "A", "age": 300, "role": null}', '{"name": "A"}'):
        assert not fits(text, SCHEMAS["flat"])
