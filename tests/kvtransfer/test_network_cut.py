"""Two network namespaces: the only way between them is TCP, and it is cut and healed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from baton.core.errors import PeerGone, TransferTimeout

NONCE = b"nonce of the test"
SEED = 1000
HERE, THERE = "10.213.77.1", "10.213.77.2"


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=10)


@dataclass
class Cable:
    """A pair of virtual devices, one end in another network namespace."""

    namespace: str
    device: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """Runs a command there, in a pid namespace of its own: as on another host."""
        return (
            *("ip", "netns", "exec", self.namespace),
            *("unshare", "--pid", "--fork", "--mount-proc", "--kill-child"),
        )

    def cut(self) -> None:
        run("ip", "link", "set", self.device, "down")

    def heal(self) -> None:
        run("ip", "link", "set", self.device, "up")


@pytest.fixture
def cable() -> Iterator[Cable]:
    for tool in ("ip", "unshare"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    made = Cable(f"baton-{os.getpid()}", f"baton{os.getpid() % 100000}")
    far = f"{made.device}p"
    try:
        run("ip", "netns", "add", made.namespace)
        run("ip", "link", "add", made.device, "type", "veth", "peer", "name", far)
        run("ip", "link", "set", far, "netns", made.namespace)
        run("ip", "addr", "add", f"{HERE}/30", "dev", made.device)
        run("ip", "link", "set", made.device, "up")
        inside = ("ip", "netns", "exec", made.namespace)
        run(*inside, "ip", "addr", "add", f"{THERE}/30", "dev", far)
        run(*inside, "ip", "link", "set", far, "up")
        run(*inside, "ip", "link", "set", "lo", "up")
        run(*made.prefix, "true")
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        remove(made)
        reason = getattr(error, "stderr", None) or str(error).encode()
        pytest.skip(f"network namespaces may not be made here: {reason.decode().strip()}")
    yield made
    remove(made)


def remove(cable: Cable) -> None:
    with contextlib.suppress(subprocess.CalledProcessError, subprocess.TimeoutExpired):
        run("ip", "link", "del", cable.device)
    with contextlib.suppress(subprocess.CalledProcessError, subprocess.TimeoutExpired):
        run("ip", "netns", "del", cable.namespace)


async def test_link_between_hosts_is_a_socket_and_survives_a_cut(
    cable, peers, make_pool, open_transport
):
    pool = make_pool("auto", 64, num_scratch_blocks=4)
    transport = open_transport("auto", pool)
    owner = peers.start("auto", prefix=cable.prefix, host=THERE)
    peer, _ = await transport.connect(owner.card, nonce=NONCE)
    link = transport.link(peer)
    assert (link.transport, link.lane) == ("socket", "tcp") and link.bytes_per_second > 1e6
    assert "shm: prefill-0 runs in another pid namespace" in link.reason
    blocks = list(range(8))
    await transport.read(peer, blocks, blocks, timeout_s=10)
    assert pool.holds(blocks, blocks, SEED)

    pool.clear()
    cable.cut()
    with pytest.raises(TransferTimeout):
        await transport.read(peer, blocks, blocks, timeout_s=1)
    assert transport.settled() == blocks, "nothing can land any more"

    cable.heal()
    read = None
    async with asyncio.timeout(30):
        while read is None:
            with contextlib.suppress(TransferTimeout, PeerGone):
                read = await transport.read(peer, [9], [9], timeout_s=1)
    assert pool.holds([9], [9], SEED) and pool.untouched(blocks), "late bytes landed"
    while transport.settled():
        pass
    assert transport.num_recycles == 0
