"""`pikv report`: which ops run on this machine, and why."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pikv_ds.ops import OPS, Ops, why_missing
from pikv_ds.version import __version__

CPU_FEATURES = ("avx2", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd")
"""Those that kernels choose by, as Linux names them."""


def ops_report() -> dict[str, Any]:
    """Backends that can run here, or the reason why not, and the owner of each op."""
    gpu = torch.cuda.is_available()
    devices = ["cpu", "cuda"] if gpu else ["cpu"]
    backends = {f"{b} on {d}": why_missing(b, d) or "ok" for d in devices for b in ("cpp", "triton")}
    if not gpu:
        backends |= {f"{b} on cuda": f"torch {torch.__version__} sees no GPU here" for b in ("cpp", "triton")}
    return {
        "pikv_ds": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "cpu_features": _cpu_features(),
        **_built(),
        "backends": backends,
        "ops": {d: {op: Ops("auto", d).implementation(op) for op in OPS} for d in devices},
    }


def _built() -> dict[str, Any]:
    """What the compiled extension holds and uses."""
    if why_missing("cpp", "cpu"):
        return {"cpu_isa": None, "cuda_architectures": []}
    from pikv_ds import _C

    return {"cpu_isa": _C.cpu_isa(), "cuda_architectures": [a for a in _C.cuda_architectures().split(";") if a]}


def _cpu_features() -> list[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    found = next((line.split(":")[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return [feature for feature in CPU_FEATURES if feature in found]


def show(facts: dict[str, Any], console: Console) -> None:
    """Prints it for people."""
    lines = [f"pikv_ds {facts['pikv_ds']}, torch {facts['torch']}, Python {facts['python']}"]
    lines.append(f"CPU features: {', '.join(facts['cpu_features']) or 'none of those that kernels use'}")
    if facts["cpu_isa"]:
        lines.append(f"compiled CPU ops use: {facts['cpu_isa']} (PIKV_CPU_ISA names a lesser one)")
        lines.append(f"compiled CUDA ops are for: {', '.join(facts['cuda_architectures']) or 'none built'}")
    for name, reason in facts["backends"].items():
        lines.append(f"{name}: {'[green]ok[/]' if reason == 'ok' else f'[red]no[/], {reason}'}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    table = Table("op", *facts["ops"])
    for op in OPS:
        table.add_row(op, *(owners[op] for owners in facts["ops"].values()))
    console.print(table)
