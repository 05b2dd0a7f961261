"""`baton keys`: make, list and revoke API keys, in a file or in the Redis of a deployment.

A key is shown once, when it is made; what is kept is its hash and whose it is.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from baton.core.errors import ConfigError
from services.router.shared.redis_store import RedisStore
from services.router.shared.state import QuotaLimits, TenantRecord, hash_key
from services.router.tenants.api_keys import PREFIX, FileKeys, new_key

T = TypeVar("T")

SHOWN_HASH_CHARS = 12
"""Of a key's hash: what `list` shows and `revoke` takes."""


class KeyStore(Protocol):
    """Where keys are kept: `FileKeys` or `RedisStore`."""

    async def list_keys(self) -> Mapping[str, TenantRecord]: ...

    async def write_key(self, key_hash: str, record: TenantRecord) -> None: ...

    async def delete_key(self, key_hash: str) -> bool: ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    create = actions.add_parser("create", help="make a key and show it, this once")
    create.add_argument("tenant", metavar="TENANT", help="whose requests it authorizes")
    for name, help_text in (
        ("requests-per-minute", "of the tenant, over all its keys"),
        ("tokens-per-minute", "prompt and output together"),
        ("max-concurrent", "requests at a time"),
    ):
        create.add_argument(f"--{name}", type=int, metavar="N", help=help_text)
    create.add_argument("--weight", type=float, default=1.0, metavar="X", help=_WEIGHT_HELP)
    create.add_argument("--priority", type=int, default=0, metavar="N", help=_PRIORITY_HELP)
    create.add_argument(
        "--slo-class", default="", metavar="NAME", help="where a request names none"
    )
    listing = actions.add_parser("list", help="show whose keys there are, and their limits")
    revoke = actions.add_parser("revoke", help="make a key invalid, within seconds")
    revoke.add_argument(
        "key", metavar="ID", help=f"of `list`: the first {SHOWN_HASH_CHARS} digits of its hash"
    )
    for action in (create, listing, revoke):
        place = action.add_mutually_exclusive_group(required=True)
        place.add_argument(
            "--file", type=Path, metavar="PATH", help="a file, as tenants.keys_file of the routers"
        )
        place.add_argument("--redis", metavar="URL", help="a store, as shared.url of the routers")
        action.add_argument(
            "--deployment", default="baton", metavar="NAME",
            help="as shared.deployment of the routers (default: %(default)s)",
        )  # fmt: skip


_WEIGHT_HELP = "share of the platform among tenants that wait (default: %(default)s)"
_PRIORITY_HELP = "of requests that name none; smaller goes first (default: %(default)s)"


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    match args.action:
        case "create":
            return _with_store(args, lambda store: _create(store, args))
        case "list":
            return _with_store(args, _list)
    return _with_store(args, lambda store: _revoke(store, args.key))


def _with_store(args: argparse.Namespace, work: Callable[[KeyStore], Awaitable[T]]) -> T:
    async def go() -> T:
        if args.file is not None:
            return await work(FileKeys(args.file))
        store = RedisStore(args.redis, deployment=args.deployment, on_garbage=_warn)
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(go())


async def _create(store: KeyStore, args: argparse.Namespace) -> int:
    limits = QuotaLimits(args.requests_per_minute, args.tokens_per_minute, args.max_concurrent)
    record = TenantRecord(args.tenant, limits, args.weight, args.priority, args.slo_class)
    key = new_key()
    await store.write_key(hash_key(key), record)
    print(key)
    print(f"id {_shown(hash_key(key))}, tenant {record.tenant}; the key is kept nowhere: keep it")
    return 0


async def _list(store: KeyStore) -> int:
    keys = await store.list_keys()
    rows = [
        ("ID", "TENANT", "WEIGHT", "PRIORITY", "CLASS", "REQUESTS/MIN", "TOKENS/MIN", "AT A TIME")
    ]
    for key_hash, record in sorted(keys.items(), key=lambda item: (item[1].tenant, item[0])):
        limits = record.limits
        rows.append((
            _shown(key_hash), record.tenant, f"{record.weight:g}", f"{record.priority}",
            record.slo_class or "-", _limit(limits.requests_per_minute),
            _limit(limits.tokens_per_minute), _limit(limits.max_concurrent),
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    return 0


async def _revoke(store: KeyStore, key: str) -> int:
    key_hash = hash_key(key) if key.startswith(PREFIX) else key.lower()
    found = [known for known in await store.list_keys() if known.startswith(key_hash)]
    if len(key_hash) < SHOWN_HASH_CHARS or len(found) != 1:
        raise ConfigError(
            f"{_shown(key_hash)!r} is the id of {len(found) or 'no'} key(s); "
            "see `baton keys list` for ids"
        )
    await store.delete_key(found[0])
    print(f"revoked {_shown(found[0])}")
    return 0


def _shown(key_hash: str) -> str:
    return key_hash[:SHOWN_HASH_CHARS]


def _limit(limit: int | None) -> str:
    return "-" if limit is None else f"{limit}"


def _warn(kind: str, reason: str) -> None:
    print(f"warning: a stored {kind} cannot be read: {reason}", file=sys.stderr)
