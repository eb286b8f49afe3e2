"""`pikv report`: which ops run on this machine, and why."""

from __future__ import annotations

import platform
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pikv_ds.ops import OPS, Ops, why_missing
from pikv_ds.version import __version__


def ops_report() -> dict[str, Any]:
    """Backends that can run here, or the reason why not, and the owner of each op."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "pikv_ds": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu_isa": _cpu_isa(),
        "backends": {d: {b: why_missing(b, d) or "ok" for b in ("cpp", "triton")} for d in devices},
        "ops": {d: {op: Ops("auto", d).implementation(op) for op in OPS} for d in devices},
    }


def _cpu_isa() -> str | None:
    """Instruction set that the compiled CPU ops use, None without them."""
    if why_missing("cpp", "cpu"):
        return None
    from pikv_ds import _C

    return _C.cpu_isa()


def show(facts: dict[str, Any], console: Console) -> None:
    """Prints it for people."""
    console.print(f"pikv_ds {facts['pikv_ds']}, torch {facts['torch']}, Python {facts['python']}", highlight=False)
    if facts["cpu_isa"]:
        console.print(f"compiled CPU ops use {facts['cpu_isa']}", highlight=False)
    for device, backends in facts["backends"].items():
        for backend, reason in backends.items():
            mark = "[green]ok[/]" if reason == "ok" else f"[red]no[/]: {reason}"
            console.print(f"{backend} on {device}: {mark}", highlight=False)
    table = Table("op", *facts["ops"])
    for op in OPS:
        table.add_row(op, *(owners[op] for owners in facts["ops"].values()))
    console.print(table)
