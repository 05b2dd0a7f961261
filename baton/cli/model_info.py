"""How `baton model info` looks: tables for people, one JSON object for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from enum import Enum

from rich import box
from rich.console import Console
from rich.table import Table

from baton.core.quantization import weight_scheme
from baton.model_info.folder import Component
from baton.model_info.formulas import Bound, Estimate
from baton.model_info.report import Report


def print_json(report: Report) -> None:
    print(json.dumps(_plain(report), indent=1))


def _plain(value: object) -> object:
    """Nested dataclasses as JSON values; names stay those of the fields."""
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value)]
        return {name: _plain(getattr(value, name)) for name in fields}
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def print_text(report: Report) -> None:
    console = Console(highlight=False, soft_wrap=True)
    shape = report.shape
    console.print(
        f"[bold]{shape.name}[/bold]  {shape.model_type}, {shape.num_layers} layers, hidden "
        f"{shape.hidden_size}, {shape.num_heads} heads, {shape.num_kv_heads} KV heads of "
        f"{shape.head_dim}, vocabulary {shape.vocab_size:,}, context "
        f"{_count(shape.max_position_embeddings)}"
    )
    if shape.quantization is not None:
        console.print(f"quantised  {shape.quantization.name}")
    console.print(_parameter_table(report))
    console.print(
        f"KV cache   {report.kv_bytes_per_token:,} B per token, "
        f"{report.kv_bytes_per_block:,} B per block of {report.block_size} ({report.dtype})"
    )
    console.print(
        f"FLOPs      {_si(report.prefill_flops_per_token)}FLOP per prompt token (mean over "
        f"{report.context_tokens:,}), {_si(report.decode_flops_per_token)}FLOP per generated "
        f"token (context {report.context_tokens:,})"
    )
    console.print(_roofline_table(report))
    for note in report.notes:
        console.print(f"note: {note}")


def _parameter_table(report: Report) -> Table:
    shape = report.shape
    is_plain = weight_scheme(shape.quantization) is None
    stored_as = report.dtype if is_plain else "as stored"
    table = Table("component", "parameters", f"bytes ({stored_as})", "share", box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for component in Component:
        params = shape.params[component]
        if component is Component.HEAD and shape.is_tied:
            table.add_row("head", "tied to embedding", "0 B", "")
        elif params or component is not Component.OTHER:
            share = f"{params / shape.num_params:.1%}"
            num_bytes = f"{_si(report.component_bytes[component])}B"
            table.add_row(component.value, f"{params:,}", num_bytes, share)
    table.add_section()
    table.add_row("all", f"{shape.num_params:,}", f"{_si(report.weight_bytes)}B", "")
    return table


def _roofline_table(report: Report) -> Table:
    table = Table(
        title=f"Roofline: at most so many tokens/s ({report.dtype}, context "
        f"{report.context_tokens:,}; c: compute-bound, m: memory-bound)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("machine", no_wrap=True)
    decode_rows = report.rooflines[0].decode if report.rooflines else ()
    headers = ["FLOP/s", "B/s", "prefill", *(f"decode x{row.batch_size}" for row in decode_rows)]
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for roofline in report.rooflines:
        machine = roofline.machine
        table.add_row(
            machine.name,
            _si(machine.flops_for(report.dtype)),
            _si(machine.bytes_per_s),
            _rate(roofline.prefill),
            *(_rate(row.estimate) for row in roofline.decode),
        )
    return table


def _rate(estimate: Estimate) -> str:
    mark = "c" if estimate.bound is Bound.COMPUTE else "m"
    return f"{_si(estimate.tokens_per_s).replace(' ', '')} {mark}"


def _count(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _si(value: float) -> str:
    """Three digits and a decimal prefix, followed by a space or the prefix letter."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {prefix}"
    return f"{value:.4g} "
