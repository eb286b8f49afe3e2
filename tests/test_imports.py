"""Who imports whom: the core stays free of integrations, and kernels stay free of torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pikv_ds

ROOT = Path(pikv_ds.__file__).parent
CSRC = ROOT.parent / "csrc"

FOUNDATION = {
    "checks",
    "ops",
    "config",
    "layout",
    "errors",
    "placement",
    "pages",
    "policies",
    "routers",
    "sequences",
    "shape",
    "slabs",
    "trace",
}
"""Modules that import torch, the standard library and each other only."""
CORE = FOUNDATION | {"exchange", "eviction", "reuse", "sealing", "attention", "cache", "metrics", "formats"}
CORE |= {"demotion", "rebalance", "prometheus", "ranks"}
FOREIGN = {
    "metrics": {"rich"},
    "prometheus": {"prometheus_client"},
    "policies.retention": {"kvpress"},
    "policies.codecs": {"safetensors"},
}
"""Packages that a core module imports where it needs them."""
INTEGRATIONS = {"hf", "hf_cache", "hf_generate", "deepspeed_moe", "api"}
FORBIDDEN = {
    "exchange": {"attention", "cache", "sealing"},
    "eviction": {"attention", "cache", "sealing"},
    "sealing": {"attention", "cache"},
    "formats": {"exchange", "attention", "cache", "sealing", "eviction"},
    "demotion": {"exchange", "attention", "cache", "sealing", "eviction"},
    "rebalance": {"attention", "cache", "sealing"},
    "attention": {"cache", "sealing"},
    "hf": {"deepspeed_moe", "api"},
    "hf_generate": {"deepspeed_moe", "api"},
    "hf_cache": {"hf", "hf_generate", "deepspeed_moe", "api"},
    "deepspeed_moe": {"hf", "hf_cache", "hf_generate", "api"},
}


def _modules() -> dict[str, ast.Module]:
    """Syntax trees of the package by dotted name: "cache", "ops.reference", "" for the package itself."""
    trees = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        trees[".".join(p for p in parts if p != "__init__")] = ast.parse(path.read_text())
    return trees


MODULES = _modules()
NAMES = sorted(MODULES)


def _imports(tree: ast.AST) -> set[str]:
    """Dotted names of all imports in a tree, those inside functions and for type checking included."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide who imports whom"
            assert node.module is not None
            # `from pikv_ds import hf` imports the module hf
            found |= {f"{node.module}.{a.name}" if node.module == "pikv_ds" else node.module for a in node.names}
    return found


def outside(name: str) -> set[str]:
    """Top-level packages that a module imports, the standard library and this package left out."""
    return {i.split(".")[0] for i in _imports(MODULES[name])} - set(sys.stdlib_module_names) - {"pikv_ds"}


def inside(name: str) -> set[str]:
    """Top-level modules of this package that a module imports, itself left out."""
    parts = [i.split(".")[1] for i in _imports(MODULES[name]) if i.startswith("pikv_ds.")]
    return {p for p in parts if any(n == p or n.startswith(f"{p}.") for n in NAMES)} - {name.split(".")[0]}


def test_the_walk_sees_the_package() -> None:
    assert {"", "cache", "ops", "ops.reference", "policies.lookups", "hf"} <= set(NAMES)
    assert inside("cache") >= {"attention", "exchange", "pages", "sealing"}
    assert outside("hf") == {"torch", "transformers"}
    assert "deepspeed" in outside("deepspeed_moe")  # inside a function
    tops = {n.split(".")[0] for n in NAMES}
    assert tops >= CORE | INTEGRATIONS


@pytest.mark.parametrize("name", [n for n in NAMES if n.split(".")[0] in FOUNDATION])
def test_the_foundation_imports_only_torch_and_itself(name: str) -> None:
    foreign = FOREIGN.get(name, {"triton"} if name.startswith("ops.triton") else set())
    assert outside(name) <= {"torch"} | foreign
    assert inside(name) <= FOUNDATION


@pytest.mark.parametrize("name", [n for n in NAMES if n.split(".")[0] in CORE])
def test_the_core_imports_no_integration(name: str) -> None:
    assert not inside(name) & INTEGRATIONS
    foreign = FOREIGN.get(name, {"triton"} if name.startswith("ops.triton") else set())
    assert outside(name) <= {"torch"} | foreign


@pytest.mark.parametrize("name", FORBIDDEN)
def test_layers_do_not_import_what_is_above_or_beside_them(name: str) -> None:
    assert not inside(name) & FORBIDDEN[name]


def test_only_the_front_door_imports_integrations() -> None:
    above = {n for n in NAMES if n and inside(n) & INTEGRATIONS}
    assert {n for n in above if not n.startswith("eval.")} <= {
        "api", "hf", "hf_cache", "hf_generate", "reference_model", "cli"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        (
            "transformers",
            {"bench.attention", "checkpoints", "hf", "hf_cache", "hf_generate", "reference_model"}
            | {f"eval.{name}" for name in ("command", "methods", "run", "snapshot")},
        ),
        ("deepspeed", {"deepspeed_moe"}),
        ("megatron", set()),
    ],
)
def test_foreign_packages_are_imported_in_their_own_files(package: str, allowed: set[str]) -> None:
    assert {n for n in NAMES if package in outside(n)} <= allowed


def test_only_megatron_patch_imports_megatron() -> None:
    """Tests may look into Megatron, too."""
    root = ROOT.parent
    for folder in ("examples", "benchmarks"):
        for path in (root / folder).glob("*.py"):
            assert not {i for i in _imports(ast.parse(path.read_text())) if i.split(".")[0] == "megatron"}, path


def _uses_environment(tree: ast.AST) -> bool:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv", "unsetenv"):
            return True
        if (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and {a.name for a in node.names} & {"environ", "getenv"}
        ):
            return True
    return False


def test_only_launch_env_touches_the_environment() -> None:
    assert {n for n in NAMES if _uses_environment(MODULES[n])} == {"launch_env"}


@pytest.mark.skipif(not CSRC.is_dir(), reason="an installed package has no csrc")
def test_only_the_bindings_include_torch() -> None:
    sources = [p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh", ".hpp", ".c")]
    with_torch = set()
    for path in sources:
        headers = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), flags=re.MULTILINE)
        if any(h.split("/")[0] in ("torch", "ATen", "c10", "caffe2", "pybind11") or h == "Python.h" for h in headers):
            with_torch.add(path.relative_to(CSRC).as_posix())
    assert CSRC / "launch.h" in sources
    assert with_torch == {"bindings.cpp", "checks.h"}


def test_importing_the_package_loads_no_integration() -> None:
    code = "import sys, pikv_ds; print([m for m in ('transformers', 'deepspeed', 'rich', 'gguf') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
