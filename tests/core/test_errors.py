from __future__ import annotations

import inspect

import grpc
import pytest

from baton.core import errors
from baton.core.errors import (
    BatonError,
    InvalidRequest,
    Overloaded,
    WorkerLost,
    public_message,
    wire_status,
)

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, BatonError)]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_every_error_has_a_valid_wire_status(cls):
    status = wire_status(cls("message"))
    assert 400 <= status.http <= 599
    assert status.grpc in grpc.StatusCode.__members__
    assert status.openai_type


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_every_error_stands_in_the_drawn_tree(cls):
    assert cls.__name__ in (errors.__doc__ or "")


def test_status_is_found_along_the_hierarchy():
    assert wire_status(WorkerLost("x")).http == 503
    assert wire_status(InvalidRequest("x")).http == 400
    assert wire_status(Overloaded("x")).http == 429
    assert wire_status(ValueError("x")).http == 500


def test_only_deliberate_messages_are_public():
    assert public_message(InvalidRequest("n must be 1")) == "n must be 1"
    assert "secret" not in public_message(RuntimeError("secret path"))


def test_request_errors_carry_what_the_client_needs():
    assert InvalidRequest("x", param="n").param == "n"
    assert Overloaded("x", retry_after_s=2.5).retry_after_s == 2.5
