"""What a sequence derives from its request."""

from __future__ import annotations

from types import ModuleType

from baton.engine.sequence import Sequence, SequenceStatus


def test_tokens_are_prompt_and_replayed_output(harness: ModuleType) -> None:
    sequence = Sequence(harness.make_request("r", [1, 2, 3], output_token_ids=(4, 5)))
    assert sequence.token_ids == [1, 2, 3, 4, 5]
    assert sequence.output_token_ids == [4, 5]
    assert (sequence.num_prompt_tokens, sequence.num_output_tokens) == (3, 2)
    assert sequence.status is SequenceStatus.WAITING


def test_max_tokens_counts_replayed_output(harness: ModuleType) -> None:
    sequence = Sequence(harness.make_request("r", [1, 2], output_token_ids=(4,), max_tokens=10))
    assert sequence.max_num_tokens == 12


def test_stop_ids_are_eos_and_the_requests_own(harness: ModuleType) -> None:
    request = harness.make_request("r", [1], eos_token_ids=(7, 8), stop_token_ids=(9,))
    assert Sequence(request).stop_ids == {7, 8, 9}
    request = harness.make_request(
        "r", [1], eos_token_ids=(7,), stop_token_ids=(9,), ignore_eos=True
    )
    assert Sequence(request).stop_ids == {9}


def test_sequences_are_compared_by_identity(harness: ModuleType) -> None:
    request = harness.make_request("r", [1])
    assert Sequence(request) != Sequence(request)
