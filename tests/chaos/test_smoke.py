"""The shortest of the chaos: one reader and one owner are killed under load. Belongs in CI."""

from __future__ import annotations

ASKS = {"prompt_tokens": 300, "max_tokens": 20}


async def test_reader_and_owner_killed_mid_read(start_cluster, traffic_to) -> None:
    cluster = await start_cluster(2, 2)
    traffic = traffic_to(cluster, seed=1)
    for victim in ("decode-0", "prefill-0"):
        asks = traffic.asks(6, **ASKS)
        sent = traffic.send(asks)
        await traffic.until_moving("prefill-0")
        cluster.kill(victim)
        await traffic.finish(asks, sent)
        await cluster.calm()
    await traffic.run(traffic.asks(2, **ASKS))
    await cluster.calm()
