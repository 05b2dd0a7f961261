"""Print the ten longest files and functions. A light, not a law: it never fails."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("baton", "kvtransfer", "services", "bench", "tools")


def source_files() -> list[Path]:
    files = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")]
    return [p for p in files if "rpc/v1" not in p.as_posix()]


def functions(path: Path) -> list[tuple[int, str]]:
    """(lines, name) of every function in `path`."""
    tree = ast.parse(path.read_text())
    return [
        (node.end_lineno - node.lineno + 1, f"{path.relative_to(ROOT)}:{node.name}")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    ]


def main() -> None:
    files = source_files()
    by_lines = [(len(p.read_text().splitlines()), str(p.relative_to(ROOT))) for p in files]
    for title, rows in (
        ("longest files", by_lines),
        ("longest functions", [f for p in files for f in functions(p)]),
    ):
        print(f"{title}:")
        for lines, name in sorted(rows, reverse=True)[:10]:
            print(f"  {lines:5d}  {name}")


if __name__ == "__main__":
    main()
