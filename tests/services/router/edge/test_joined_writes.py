"""A response's head leaves with what follows it, and never waits beyond the loop's turn."""

from __future__ import annotations

import asyncio

import pytest

from services.router.edge.joined_writes import JoinedTransport

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"


class Sink:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.is_closed = False

    def write(self, data: bytes) -> None:
        assert not self.is_closed
        self.writes.append(data)

    def close(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed

    def get_extra_info(self, name: str) -> str:
        return f"extra {name}"


@pytest.fixture
async def sink() -> Sink:
    return Sink()


@pytest.fixture
async def transport(sink: Sink) -> JoinedTransport:
    return JoinedTransport(sink)  # type: ignore[arg-type]


async def test_head_and_body_are_one_write(sink, transport):
    transport.write(HEAD)
    transport.write(b"ok")
    transport.write(b"more")
    await asyncio.sleep(0)
    assert sink.writes == [HEAD + b"ok", b"more"]


async def test_head_alone_leaves_with_the_turn(sink, transport):
    transport.write(HEAD)
    assert not sink.writes
    await asyncio.sleep(0)
    assert sink.writes == [HEAD]
    transport.write(b"ok")
    assert sink.writes == [HEAD, b"ok"]


async def test_head_is_not_lost_by_a_close(sink, transport):
    transport.write(HEAD)
    transport.close()
    await asyncio.sleep(0)
    assert sink.writes == [HEAD] and sink.is_closed


async def test_two_heads_stay_in_order(sink, transport):
    transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    transport.write(HEAD)
    transport.write(b"ok")
    await asyncio.sleep(0)
    assert b"".join(sink.writes) == b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"ok"


async def test_everything_else_is_the_connection(sink, transport):
    assert transport.get_extra_info("peername") == "extra peername"


@pytest.mark.parametrize("waits", [True, False])
async def test_what_comes_after_the_client_broke_the_connection_goes_nowhere(
    sink, transport, waits
):
    if waits:
        transport.write(HEAD)
    # As a reset does, before the protocol hears of it.
    sink.is_closed = True
    transport.write(b"late")
    await asyncio.sleep(0)
    assert not sink.writes
