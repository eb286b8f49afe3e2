"""The CPU kernels compile for machines other than this one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
COMPILER = shutil.which("aarch64-linux-gnu-g++")


@pytest.mark.skipif(
    COMPILER is None, reason="no aarch64-linux-gnu-g++ (Debian: apt-get install g++-aarch64-linux-gnu)"
)
@pytest.mark.parametrize("source", sorted((CSRC / "cpu").glob("*.cpp")), ids=lambda path: path.stem)
def test_aarch64(source: Path, tmp_path: Path) -> None:
    assert COMPILER is not None
    flags = ["-std=c++17", "-O1", "-fopenmp", "-Wall", "-Werror", f"-I{CSRC}"]
    command = [COMPILER, *flags, "-c", str(source), "-o", str(tmp_path / "kernel.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
