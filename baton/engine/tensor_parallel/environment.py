"""What libraries between the ranks read from the environment of a process."""

from __future__ import annotations

from collections.abc import MutableMapping

WITHOUT_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
"""NVLink's multicast units are shared by all processes of the host and need a fabric manager."""


def turn_multicast_off(environ: MutableMapping[str, str]) -> None:
    """Unless `environ` says otherwise. To be done before the libraries are first used."""
    for name, value in WITHOUT_MULTICAST.items():
        environ.setdefault(name, value)
