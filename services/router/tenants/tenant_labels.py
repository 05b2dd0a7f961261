"""Tenants as values of a label, of which there must be few: names come from clients.

Counters cannot be renamed, so a tenant keeps the label it first got: its name while there is room
for it, else `OTHER`. One object a router, so that a tenant has the same label in every family.
"""

from __future__ import annotations

from collections.abc import Iterable

MAX_TENANT_LABELS = 20
"""Tenants with a label of their own; the others share `OTHER`."""
OTHER = "other"
ANONYMOUS = "anonymous"
MAX_LABEL_CHARS = 64


class TenantLabels:
    def __init__(self, first: Iterable[str] = ()) -> None:
        """`first`: tenants known beforehand, as far as there is room."""
        self._named: set[str] = set(list(first)[:MAX_TENANT_LABELS])

    @property
    def known(self) -> list[str]:
        """All labels given so far."""
        return sorted({label_of(tenant) for tenant in self._named} | {OTHER})

    def label(self, tenant: str) -> str:
        if tenant not in self._named:
            if len(self._named) >= MAX_TENANT_LABELS:
                return OTHER
            self._named.add(tenant)
        return label_of(tenant)


def label_of(tenant: str) -> str:
    """Its name, fit for a label."""
    return tenant[:MAX_LABEL_CHARS] or ANONYMOUS
