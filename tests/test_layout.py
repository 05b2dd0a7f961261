"""The architecture as a test: who may import whom, and that nobody else owns our names."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("baton", "kernels", "kvtransfer", "services")

# Package -> the packages of ours it may import (its own subtree is always allowed). The longest
# matching prefix decides. Mirrors the table in docs/architecture.md.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "baton.core": (),
    "baton.settings": ("baton.core",),
    "baton.process": (),
    "baton.rpc": ("baton.core",),
    "baton.telemetry": ("baton.core",),
    "baton.registry": ("baton.core", "baton.process"),
    "baton.model_import": ("baton.core",),
    "baton.model_info": ("baton.core",),
    "baton.engine": ("baton.core", "kernels"),
    "kernels": (),
    "kvtransfer": ("baton.core",),
    "kvtransfer.mapped_link": ("baton.core", "kernels", "kvtransfer"),
    "services.worker": (
        "baton.core",
        "baton.settings",
        "baton.process",
        "baton.engine",
        "baton.rpc",
        "baton.telemetry",
        "baton.registry",
        "kvtransfer",
    ),
    "services.prefill": ("baton.core", "baton.engine", "services.worker"),
    "services.decode": ("baton.core", "baton.engine", "services.worker"),
    "services.router": (
        "baton.core",
        "baton.settings",
        "baton.process",
        "baton.rpc",
        "baton.telemetry",
        "baton.registry",
        "baton.engine.tokenizer",
        "baton.engine.grammar.validate",
    ),
    "baton.simulator": ("baton.core", "baton.engine", "baton.telemetry", "services.router"),
    "services.planner": (
        "baton.core",
        "baton.settings",
        "baton.process",
        "baton.telemetry",
        "baton.model_info",
        "baton.simulator",
        "services.router",
    ),
    "baton.loadtest": (
        "baton.core",
        "baton.rpc",
        "baton.simulator.arrivals",
        "baton.simulator.trace_files",
        "baton.simulator.workload",
    ),
    "services.launch": ("baton", "services"),
    "baton.cli": ("baton", "kvtransfer", "services"),
    "baton": (),
    "services": (),
}
TORCH_FREE = (
    "baton/core",
    "baton/rpc",
    "baton/telemetry",
    "baton/registry",
    "kvtransfer",
    "services/router",
    "baton/simulator",
    "baton/loadtest",
    "services/planner",
    "baton/engine/tokenizer.py",
    "baton/engine/detokenizer.py",
    "baton/engine/token_bytes.py",
    "baton/engine/chat_template.py",
    "baton/engine/sequence.py",
    "baton/engine/block_pool.py",
    "baton/engine/scheduler.py",
    "baton/engine/batch.py",
    "baton/engine/in_flight.py",
    "baton/engine/engine.py",
    "baton/engine/config.py",
    "baton/engine/tensor_parallel/group.py",
    "baton/engine/tensor_parallel/limits.py",
    "baton/engine/tensor_parallel/process.py",
)


def source_files() -> list[Path]:
    return sorted(p for name in OURS for p in (ROOT / name).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> set[str]:
    """Absolute names of everything `path` imports, at any depth of the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names.add(node.module)
    return names


def is_below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def rule_for(module: str) -> str:
    return max((p for p in MAY_IMPORT if is_below(module, p)), key=len)


def test_imports_follow_the_table() -> None:
    offences = []
    for path in source_files():
        module = module_name(path)
        package = rule_for(module)
        allowed = (*MAY_IMPORT[package], package)
        offences += [
            f"{module} imports {name}"
            for name in sorted(imported_modules(path))
            if name.split(".")[0] in OURS
            and name != "baton"  # the version lives there
            and not any(is_below(name, a) for a in allowed)
        ]
    assert offences == []


def test_control_files_and_router_import_no_torch() -> None:
    offences = [
        module_name(path)
        for path in source_files()
        if any(path.is_relative_to(ROOT / place) for place in TORCH_FREE)
        and any(is_below(name, "torch") for name in imported_modules(path))
    ]
    assert offences == []


def test_only_one_file_imports_nixl() -> None:
    offenders = {
        module_name(path)
        for path in source_files()
        if any(name.split(".")[0].startswith("nixl") for name in imported_modules(path))
    }
    assert offenders <= {"kvtransfer.nixl_library"}


def test_no_other_distribution_claims_our_names() -> None:
    owners = importlib.metadata.packages_distributions()
    for name in OURS:
        assert set(owners.get(name, [])) <= {"baton"}, f"{name} is claimed by {owners[name]}"
    for name in OURS:
        origin = importlib.import_module(name).__file__
        assert origin is not None
        assert Path(origin).is_relative_to(ROOT)


def test_proto_folder_is_no_package() -> None:
    assert list((ROOT / "proto").rglob("*.py")) == []


def test_generated_stubs_are_fresh(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="the generator comes with the lint extra")
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from generate_protos import generate
    finally:
        sys.path.pop(0)
    for fresh in generate(tmp_path):
        committed = ROOT / fresh.relative_to(tmp_path)
        assert committed.read_text() == fresh.read_text(), f"{committed.name}: run make protos"
