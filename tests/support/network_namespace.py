"""A network namespace joined to ours by one link that can be cut and healed. Needs root."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from dataclasses import dataclass, field

TIMEOUT_S = 10


def obstacle() -> str:
    """Why this machine has no namespaces for us; empty when it has."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no ip command"
    try:
        namespace = NetworkNamespace()
        namespace.create()
        namespace.remove()
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"
    return ""


@dataclass
class NetworkNamespace:
    """Two addresses of a network of its own."""

    name: str = field(default_factory=lambda: f"baton{secrets.token_hex(3)}")
    octet: int = field(default_factory=lambda: 1 + secrets.randbelow(250))

    @property
    def outside_address(self) -> str:
        return f"10.219.{self.octet}.1"

    @property
    def inside_address(self) -> str:
        return f"10.219.{self.octet}.2"

    @property
    def prefix(self) -> tuple[str, ...]:
        """Runs the rest of a command inside."""
        return ("ip", "netns", "exec", self.name)

    def create(self) -> None:
        outer, inner = f"{self.name}o", f"{self.name}i"
        _ip("netns", "add", self.name)
        _ip("link", "add", outer, "type", "veth", "peer", "name", inner, "netns", self.name)
        _ip("addr", "add", f"{self.outside_address}/30", "dev", outer)
        _ip("link", "set", outer, "up")
        _ip("-n", self.name, "addr", "add", f"{self.inside_address}/30", "dev", inner)
        _ip("-n", self.name, "link", "set", inner, "up")
        _ip("-n", self.name, "link", "set", "lo", "up")

    def cut(self) -> None:
        """What is sent from now on is lost without a word, in both directions."""
        for where, device, address in self._ends():
            # Frames for nobody: the interfaces stay up and no sender gets an error.
            nobody = ("lladdr", "02:00:00:00:00:01", "nud", "permanent")
            _ip(*where, "neigh", "replace", address, "dev", device, *nobody)

    def heal(self) -> None:
        for where, device, address in self._ends():
            _ip(*where, "neigh", "del", address, "dev", device)

    def _ends(self) -> tuple[tuple[tuple[str, ...], str, str], ...]:
        """Where each end is, its device and the address it sends to."""
        return (
            ((), f"{self.name}o", self.inside_address),
            (("-n", self.name), f"{self.name}i", self.outside_address),
        )

    def remove(self) -> None:
        subprocess.run(
            ["ip", "netns", "del", self.name], capture_output=True, timeout=TIMEOUT_S, check=False
        )


def _ip(*arguments: str) -> None:
    subprocess.run(
        ["ip", *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
