"""What the command needs of a running system, however it was started."""

from __future__ import annotations

from typing import Protocol


class LocalSystem(Protocol):
    """All calls come from one thread."""

    def poll(self) -> None:
        """Do what is due, such as restarting what has died. Called several times a second."""
        ...

    def hopeless(self) -> str | None:
        """Why the system will not come up, or None while it may."""
        ...

    def ready(self) -> None:
        """It serves: begin what has to wait for that. Called once."""
        ...

    def stop(self, *, grace_s: float) -> None:
        """End everything within about `grace_s` seconds; nothing is left running."""
        ...
