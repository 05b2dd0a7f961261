"""A worker without a transport refuses readably and never touches memory."""

from __future__ import annotations

import pytest

from baton.core.block import BlockId
from baton.core.errors import IncompatiblePeer, PeerGone
from baton.core.worker_info import WorkerId
from kvtransfer.no_transport import NoTransport


async def test_everything_is_refused_with_the_reason() -> None:
    transport = NoTransport("its KV lies in GPU memory")
    assert transport.name == "none"
    with pytest.raises(IncompatiblePeer, match="its KV lies in GPU memory"):
        await transport.connect(b"anything", nonce=bytes(16))
    with pytest.raises(PeerGone, match="GPU memory"):
        await transport.read(WorkerId("p"), [BlockId(0)], [BlockId(1)], timeout_s=1.0)
    with pytest.raises(PeerGone, match="GPU memory"):
        transport.units_per_block(WorkerId("p"))
    with pytest.raises(PeerGone, match="GPU memory"):
        await transport.measure(WorkerId("p"), num_rounds=1, timeout_s=1.0)
    assert transport.link(WorkerId("p")) is None
    assert transport.card(bytes(16)) == b""
    assert transport.settled() == []
    await transport.disconnect(WorkerId("p"))
    await transport.close()
