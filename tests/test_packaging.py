"""Source distributions hold the repository, wheels the packages; a machine without CUDA kernels says so."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from pikv_ds import ops as ops_module
from pikv_ds.ops import Ops, why_missing
from pikv_ds.tools import report
from pikv_ds.version import __version__

ROOT = Path(__file__).resolve().parents[1]
MADE = ("PKG-INFO", "setup.cfg", "pikv_ds.egg-info")
"""What setuptools adds."""


def build(what: str, source: Path, out: Path) -> Path:
    """A distribution, without the network, a CUDA toolkit or a compiler."""
    code = f"from setuptools import build_meta; print(build_meta.build_{what}({str(out)!r}))"
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH", "PYTHONPATH")}
    environment |= {"PIKV_BUILD_CPP": "0", "PIKV_BUILD_CUDA": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """The repository's files."""
    git = ["git", "-C", str(ROOT), "ls-files", "--cached"]
    done = subprocess.run(git, capture_output=True, text=True, check=False) if shutil.which("git") else None
    if done is None or done.returncode or not (ROOT / ".git").exists():
        pytest.skip("no git checkout: nothing says what a source distribution should hold")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def unpacked(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution, built from a copy of the repository with what builds and tests leave behind."""
    folder = tmp_path_factory.mktemp("sdist")
    copy = folder / "copy"
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    for name in ("pikv_ds/_C.abi3.so", "tests/__pycache__/x.pyc", "csrc/cpu/x.o", "build/x.py", "examples/x.gguf"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("rest")
    with tarfile.open(build("sdist", copy, folder)) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"pikv_ds-{__version__}"


def test_a_source_distribution_holds_the_repository(tracked: list[str], unpacked: Path) -> None:
    there = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert sorted(set(tracked) - there) == []
    assert sorted(name for name in there - set(tracked) if Path(name).parts[0] not in MADE) == []
    assert sum(name.endswith((".cu", ".cuh")) for name in there) == len(list(ROOT.glob("csrc/cuda/*.cu*"))) > 0


def test_a_wheel_of_it_holds_the_packages_and_no_tests(unpacked: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build("wheel", unpacked, tmp_path)) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())
    packages = ("pikv_ds", "megatron_patch")
    assert names == {str(path.relative_to(ROOT)) for package in packages for path in ROOT.glob(f"{package}/**/*.py")}


# -- what a build says about CUDA --------------------------------------------------------------


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Any:
    """setup.py as a module, that builds nothing."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")  # or the module would set it
    monkeypatch.delenv("PIKV_BUILD_CUDA", raising=False)
    spec = importlib.util.spec_from_file_location("pikv_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toolkit(folder: Path) -> Path:
    (folder / "include").mkdir(parents=True)
    (folder / "include/cuda_runtime.h").touch()
    return folder


def test_a_build_knows_why_it_has_no_cuda(setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.torch.version, "cuda", "13.0")
    monkeypatch.setattr(setup.cpp_extension, "CUDA_HOME", str(toolkit(tmp_path / "cuda")))
    assert setup.why_no_cuda() is None
    monkeypatch.setattr(setup.cpp_extension, "CUDA_HOME", str(tmp_path))  # that of a wrapper in tmp_path/bin
    assert "is no CUDA toolkit" in setup.why_no_cuda()
    monkeypatch.setattr(setup.cpp_extension, "CUDA_HOME", None)
    assert "no CUDA toolkit was found (CUDA_HOME" in setup.why_no_cuda()
    monkeypatch.setattr(setup.torch.version, "cuda", None)
    assert "is built for CPUs" in setup.why_no_cuda()
    monkeypatch.setenv("PIKV_BUILD_CUDA", "0")
    assert setup.why_no_cuda() == "PIKV_BUILD_CUDA=0 left them out"


@pytest.mark.parametrize(
    ("cuda", "gpu", "home", "said"),
    [
        ("13.0", False, None, "no CUDA toolkit was found"),
        (None, True, None, "is built for CPUs"),
        (None, False, None, None),
        ("13.0", True, "toolkit", None),
    ],
)
def test_a_build_says_that_a_gpu_gets_no_kernels(
    setup: Any, cuda: str | None, gpu: bool, home: str | None, said: str | None, tmp_path: Path, monkeypatch, capsys
) -> None:
    import setuptools

    monkeypatch.setattr(setup.torch.version, "cuda", cuda)
    monkeypatch.setattr(setup, "has_gpu", lambda: gpu)
    monkeypatch.setattr(setup.cpp_extension, "CUDA_HOME", home and str(toolkit(tmp_path / home)))
    monkeypatch.setattr(setup.BuildExtension, "run", lambda self: None)
    monkeypatch.setenv("PIKV_BUILD_CPP", "1")
    setup.OptionalBuildExtension(setuptools.Distribution()).run()
    warning = capsys.readouterr().err
    if said is None:
        assert warning == ""
    else:
        assert re.search(f"warning: pikv-ds: building without CUDA kernels: .*{re.escape(said)}.*CUDA_HOME", warning)


@pytest.mark.skipif(why_missing("cpp", "cpu") is not None, reason="no compiled ops")
@pytest.mark.skipif(why_missing("cpp", "cuda") is None, reason="this extension has CUDA kernels")
def test_a_cache_on_a_gpu_without_kernels_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    from pikv_ds import _C

    cause = _C.why_no_cuda()
    assert cause
    if torch.version.cuda is None:
        assert "is built for CPUs" in cause
    ops_module._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "pikv_ds"):
        for _ in range(2):
            Ops("auto", "cuda")
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(("the ops run on Triton", "the ops run as plain torch"))
    assert f"built without CUDA kernels ({cause})" in warning
    assert "set CUDA_HOME" in warning
    with pytest.raises(ValueError, match=r'pikv.backend = "cpp": .* was built without CUDA kernels'):
        Ops("cpp", "cuda")


@pytest.mark.skipif(why_missing("cpp", "cpu") is not None, reason="no compiled ops")
@pytest.mark.skipif(why_missing("cpp", "cuda") is None, reason="this extension has CUDA kernels")
def test_the_report_says_why_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from pikv_ds import _C

    console = Console(file=io.StringIO(), width=200)
    report.show(report.ops_report(), console)
    assert isinstance(console.file, io.StringIO)
    assert f"compiled CUDA ops are for: none built: {_C.why_no_cuda()}" in console.file.getvalue()
    if not torch.cuda.is_available():
        monkeypatch.setattr(report, "GPU_NODE", Path("/dev/null"))
        monkeypatch.setattr(torch.version, "cuda", None)
        assert "there is an NVIDIA GPU, but torch" in report.ops_report()["backends"]["cpp on cuda"]
