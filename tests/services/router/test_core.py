"""What runs beside the requests of a router."""

from __future__ import annotations

import asyncio


async def test_gauges_go_on_after_one_of_them_fails(cluster, monkeypatch, caplog):
    calls = []

    def update() -> None:
        calls.append(None)
        if len(calls) == 1:
            raise ValueError("a defect")

    monkeypatch.setattr("services.router.core.GAUGE_PERIOD_S", 0.01)
    monkeypatch.setattr(cluster.core.gate, "update_gauges", update)
    async with asyncio.timeout(5):
        while len(calls) < 2:
            await asyncio.sleep(0.01)
    assert "gauges could not be updated" in caplog.text
    await cluster.settled()
