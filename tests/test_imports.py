"""Who imports whom: down only, by folder; the core stays free of integrations, and kernels stay free of torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import pikv_ds

ROOT = Path(pikv_ds.__file__).parent
CSRC = ROOT.parent / "csrc"

GROUND = ["errors", "version", "layout", "slabs", "checks"]
"""Modules at the top of the package that everything may stand on."""
MAY_IMPORT = {
    "ops": {"ground"},
    "policies": {"ground", "ops"},
    "config": {"ground", "ops", "policies"},
    "core": {"ground", "ops", "policies", "config"},
    "observe": {"ground", "core"},
    "integrations": {"ground", "ops", "policies", "config", "core", "launch_env"},
    "launch_env": {"ground"},
    "api": {"ground", "ops", "config", "core", "observe", "integrations", "launch_env"},
    "tools": {"ground", "ops", "policies", "config", "core", "observe", "integrations", "launch_env", "api"},
}
"""What the modules of each folder, and the single ones, may import beside their own folder."""
FOREIGN = {
    "core.trace": set(),
    "observe.metrics": {"rich"},
    "observe.prometheus": {"prometheus_client"},
    "policies.retention": {"kvpress"},
    "policies.codecs": {"safetensors"},
}
"""Packages beside torch that a module below the integrations imports where it needs them."""


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
            package = node.module in ("pikv_ds", "megatron_patch")
            found |= {f"{node.module}.{a.name}" if package else node.module for a in node.names}
    return found


def outside(name: str) -> set[str]:
    """Top-level packages that a module imports, the standard library and this package left out."""
    return {i.split(".")[0] for i in _imports(MODULES[name])} - set(sys.stdlib_module_names) - {"pikv_ds"}


def folder(name: str) -> str:
    """The folder of a module, the module itself at the top of the package; "ground" for what all may stand on."""
    top = name.split(".")[0]
    return "ground" if top in GROUND else top


def inside(name: str) -> set[str]:
    """Folders of this package that a module imports, its own left out."""
    parts = [i.removeprefix("pikv_ds.") for i in _imports(MODULES[name]) if i.startswith("pikv_ds.")]
    return {folder(p) for p in parts if any(n == p or n.startswith(f"{p}.") for n in NAMES)} - {folder(name)}


def test_the_walk_sees_the_package() -> None:
    assert {"", "core.cache", "ops", "ops.reference", "policies.lookups", "integrations.hf.attachment"} <= set(NAMES)
    assert inside("core.cache") >= {"config", "policies"}
    assert outside("integrations.hf.attachment") == {"torch", "transformers"}
    assert "deepspeed" in outside("integrations.deepspeed")  # inside a function
    assert {folder(n) for n in NAMES if n} == set(MAY_IMPORT) | {"ground"}


@pytest.mark.parametrize("name", [n for n in NAMES if n])
def test_imports_go_down(name: str) -> None:
    assert inside(name) <= MAY_IMPORT.get(folder(name), set())


@pytest.mark.parametrize(
    "name", [n for n in NAMES if folder(n) in ("ground", "ops", "policies", "config", "core", "observe")]
)
def test_below_the_integrations_there_are_torch_and_numpy_only(name: str) -> None:
    foreign = FOREIGN.get(name, {"triton"} if name.startswith("ops.triton") else set())
    assert outside(name) <= {"torch", "numpy"} | foreign


def test_integrations_do_not_import_each_other() -> None:
    for name in NAMES:
        if name.startswith("integrations."):
            kinds = {"integrations.hf": "integrations.deepspeed", "integrations.deepspeed": "integrations.hf"}
            other = next((v for k, v in kinds.items() if name.startswith(k)), None)
            if other is not None:
                assert not {i for i in _imports(MODULES[name]) if i.startswith(f"pikv_ds.{other}")}, name


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("transformers", ("integrations.hf", "tools")),
        ("deepspeed", ("integrations.deepspeed",)),
        ("megatron", ()),
    ],
)
def test_foreign_packages_are_imported_in_their_own_folders(package: str, allowed: tuple[str, ...]) -> None:
    assert not {n for n in NAMES if package in outside(n) and not n.startswith(allowed or ("nowhere",))}


def test_only_megatron_patch_imports_megatron() -> None:
    """Tests may look into Megatron, too."""
    root = ROOT.parent
    for folder in ("examples", "benchmarks"):
        for path in (root / folder).glob("*.py"):
            assert not {i for i in _imports(ast.parse(path.read_text())) if i.split(".")[0] == "megatron"}, path


def test_megatron_patch_has_no_import_cycle() -> None:
    """Imports inside functions and for type checking count as any other."""
    paths = (ROOT.parent / "megatron_patch").glob("*.py")
    imports = {path.stem: _imports(ast.parse(path.read_text())) for path in paths}

    def module(dotted: str) -> str:
        """What is no module of its own is the package's."""
        name = dotted.removeprefix("megatron_patch").removeprefix(".").split(".")[0]
        return name if name in imports else "__init__"

    graph = {name: {module(i) for i in found if i.startswith("megatron_patch")} for name, found in imports.items()}
    assert graph["attachment"] >= {"attention", "checks", "latent", "requests"}
    assert graph["server"] >= {"__init__", "coordinator"}  # inside functions
    TopologicalSorter(graph).prepare()  # CycleError names the cycle


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


def test_only_the_bindings_include_torch() -> None:
    sources = [p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh", ".hpp", ".c")]
    with_torch = set()
    for path in sources:
        headers = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), flags=re.MULTILINE)
        if any(h.split("/")[0] in ("torch", "ATen", "c10", "caffe2", "pybind11") or h == "Python.h" for h in headers):
            with_torch.add(path.relative_to(CSRC).as_posix())
    assert CSRC / "launch.h" in sources
    assert with_torch == {f"bindings/{p.name}" for p in sources if p.parent == CSRC / "bindings"} != set()


def test_importing_the_package_loads_no_integration() -> None:
    code = "import sys, pikv_ds; print([m for m in ('transformers', 'deepspeed', 'rich', 'gguf') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
