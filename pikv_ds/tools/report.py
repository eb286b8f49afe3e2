"""`pikv report`: what is installed, which devices there are, which ops run here, and why not another."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pikv_ds.ops import OPS, Ops, why_missing
from pikv_ds.version import __version__

CPU_FEATURES = ("avx2", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd")
"""Those that kernels choose by, as Linux names them."""


GPU_NODE = Path("/dev/nvidiactl")
"""There where the driver of NVIDIA GPUs is."""

PACKAGES = {
    "deepspeed": ("deepspeed", "expert parallelism of Hugging Face and native MoE models"),
    "transformers": ("transformers", "Hugging Face models"),
    "megatron-core": ("megatron.core", "megatron_patch"),
    "triton": ("triton", "Triton's ops; comes with a torch for CUDA"),
    "mpi4py": ("mpi4py", "ranks that mpirun starts on several machines"),
    "kvpress": ("kvpress", "retention kvpress:NAME, and the peers of pikv eval"),
    "mooncake-transfer-engine": ("mooncake", "a Mooncake Store"),
    "flashinfer-python": ("flashinfer", "a peer of pikv bench"),
    "prometheus_client": ("prometheus_client", "metrics"),
    "matplotlib": ("matplotlib", "pictures"),
}
"""Distributions, the module that each brings, and what needs it."""


@dataclass(frozen=True)
class Found:
    """Something that is installed, or not."""

    version: str | None
    """None: it is not there."""
    note: str = ""
    """What is wrong with it, or what it is for."""
    ok: bool = True


def software() -> dict[str, Found]:
    """Versions of what PiKV works with. Imports none of it."""
    wanted = _requirements()
    out = {"python": Found(platform.python_version()), "torch": Found(torch.__version__)}
    for name, (module, use) in PACKAGES.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            there = importlib.util.find_spec(module.split(".")[0]) is not None
            note = f"a module of that name is there, but no package {name}" if there else f"for {use}"
            out[name] = Found(None, note, ok=False)
            continue
        range_ = wanted.get(name)
        fits = range_ is None or range_.contains(version, prereleases=True)
        out[name] = Found(version, "" if fits else f"PiKV wants {range_}", fits)
    out["NVIDIA apex"] = nvidia_apex()
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available() and torch.cuda.is_available()
    out["NCCL"] = (
        Found(".".join(map(str, torch.cuda.nccl.version())))
        if nccl
        else Found(None, "ranks on GPUs talk by it; this torch, or machine, has none", ok=False)
    )
    cuda = torch.version.cuda
    out["CUDA"] = Found(cuda, "what torch was built with") if cuda else Found(None, "a torch for CPUs", ok=False)
    out["nvcc"] = _program(["nvcc", "--version"], "to build the CUDA ops", line=-2)
    out["mpirun"] = _program(["mpirun", "--version"], "launch/mpirun.sh")
    out["SLURM"] = _program(["srun", "--version"], "launch/slurm/*.sbatch")
    return out


def nvidia_apex() -> Found:
    """NVIDIA's apex, told apart from the package of that name on the package index, which is something else."""
    spec = importlib.util.find_spec("apex")
    if spec is None or not spec.submodule_search_locations:
        return Found(None, "fused kernels that Megatron uses where they are", ok=False)
    if not any((Path(place) / "multi_tensor_apply").is_dir() for place in spec.submodule_search_locations):
        remedy = "the package apex that is installed is not NVIDIA's; pip uninstall apex, then github.com/NVIDIA/apex"
        return Found(None, remedy, ok=False)
    try:
        return Found(importlib.metadata.version("apex"))
    except importlib.metadata.PackageNotFoundError:
        return Found("unknown")


def _requirements() -> dict[str, Any]:
    """The ranges of versions that this package asks for, by distribution."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("pikv-ds") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    requirements = [Requirement(line) for line in lines]
    return {r.name: r.specifier for r in requirements if str(r.specifier)}


def _program(command: list[str], use: str, line: int = 0) -> Found:
    """A program's version, as it tells it."""
    if shutil.which(command[0]) is None:
        return Found(None, f"for {use}", ok=False)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return Found((done.stdout or done.stderr).strip().splitlines()[line].strip())
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip().splitlines()
        return Found(None, f"{command[0]} is there, but says: {said[-1] if said else error}", ok=False)
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return Found(None, f"{command[0]} does not run: {error}", ok=False)


def device_names() -> list[str]:
    """The GPUs, and the CPU."""
    out = []
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        memory = facts.total_memory / 2**30
        out.append(f"cuda:{i}: {facts.name}, {memory:.0f} GiB, compute capability {facts.major}.{facts.minor}")
    return [*out, f"cpu: {_cpu_name()}, {torch.get_num_threads()} threads of torch"]


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def ops_report() -> dict[str, Any]:
    """Everything that `pikv report` says: software, devices, backends or the reason why one is not there, and the
    owner of each op."""
    gpu = torch.cuda.is_available()
    devices = ["cpu", "cuda"] if gpu else ["cpu"]
    backends = {f"{b} on {d}": why_missing(b, d) or "ok" for d in devices for b in ("cpp", "triton")}
    if not gpu:
        backends |= {f"{b} on cuda": _why_no_gpu() for b in ("cpp", "triton")}
    return {
        "pikv_ds": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "software": {name: asdict(found) for name, found in software().items()},
        "devices": device_names(),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "cpu_features": _cpu_features(),
        **_built(),
        "backends": backends,
        "ops": {d: {op: Ops("auto", d).implementation(op) for op in OPS} for d in devices},
    }


def _why_no_gpu() -> str:
    if torch.version.cuda is None and GPU_NODE.exists():
        return f"there is an NVIDIA GPU, but torch {torch.__version__} is built for CPUs; install a torch for CUDA"
    return f"torch {torch.__version__} sees no GPU here"


def _built() -> dict[str, Any]:
    """What the compiled extension holds and uses."""
    if why_missing("cpp", "cpu"):
        return {"cpu_isa": None, "cuda_architectures": [], "why_no_cuda": None}
    from pikv_ds import _C

    return {
        "cpu_isa": _C.cpu_isa(),
        "cuda_architectures": [a for a in _C.cuda_architectures().split(";") if a],
        "why_no_cuda": _C.why_no_cuda() or None,
    }


def _cpu_features() -> list[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    found = next((line.split(":")[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return [feature for feature in CPU_FEATURES if feature in found]


def show(facts: dict[str, Any], console: Console) -> None:
    """Prints it for people."""
    console.print(f"[bold]pikv_ds {facts['pikv_ds']}[/]", highlight=False)
    width = max(map(len, facts["software"])) + 2
    for name, found in facts["software"].items():
        mark = "[green]ok[/]" if found["ok"] else "[yellow]no[/]" if found["version"] is None else "[red]no[/]"
        words = ", ".join(escape(x) for x in (found["version"], found["note"]) if x)
        console.print(f"{name + ' ':.<{width}} {mark}  {words}", highlight=False, soft_wrap=True)
    lines = [escape(device) for device in facts["devices"]]
    lines.append(f"CPU features: {', '.join(facts['cpu_features']) or 'none of those that kernels use'}")
    if facts["cpu_isa"]:
        lines.append(f"compiled CPU ops use: {facts['cpu_isa']} (PIKV_CPU_ISA names a lesser one)")
        none = f"none built: {facts['why_no_cuda']}"
        lines.append(f"compiled CUDA ops are for: {', '.join(facts['cuda_architectures']) or none}")
    for name, reason in facts["backends"].items():
        lines.append(f"{name}: {'[green]ok[/]' if reason == 'ok' else f'[red]no[/], {reason}'}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    table = Table("op", *facts["ops"])
    for op in OPS:
        table.add_row(op, *(owners[op] for owners in facts["ops"].values()))
    console.print(table)
