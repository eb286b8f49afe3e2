"""csrc/cuda compiles for every architecture we name, as torch's build would compile it, and the
kernels keep their state in registers: no stack frame and no spills. Needs nvcc, but no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SOURCES = sorted((Path(__file__).parents[1] / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = ["80", "90a", "100"]
REPORT = re.compile(
    r"Function properties for (?P<kernel>\w+)\s+"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)


@pytest.fixture(scope="module")
def compilations(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Future[subprocess.CompletedProcess[str]]]:
    """nvcc over every file for all architectures, two files at a time."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on the path")
    folder = tmp_path_factory.mktemp("cuda")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    flags = [*COMMON_NVCC_FLAGS, "-O3", "-std=c++17", "-DPIKV_WITH_CUDA", "-Xptxas", "-v", "-Werror", "all-warnings"]

    def compile_one(source: Path) -> subprocess.CompletedProcess[str]:
        command = [nvcc, "-c", str(source), "-o", str(folder / f"{source.stem}.o"), *flags, *targets]
        return subprocess.run(command, capture_output=True, text=True)

    pool = ThreadPoolExecutor(2)
    by_time = sorted(SOURCES, key=lambda s: not s.stem.startswith(("decode_", "seal")))  # the long ones first
    futures = {source: pool.submit(compile_one, source) for source in by_time}
    pool.shutdown(wait=False)
    return futures


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_compiles_without_spills(source: Path, compilations) -> None:
    result = compilations[source].result()
    assert result.returncode == 0, result.stderr
    kernels = [m for m in REPORT.finditer(result.stderr) if "pikv_ds" in m["kernel"]]
    spilling = [m[0] for m in kernels if (m["stack"], m["stores"], m["loads"]) != ("0", "0", "0")]
    assert not spilling, "\n".join(spilling)
    if source.stem not in ("decode_attention", "prefill_attention"):  # they launch others' kernels
        assert len(kernels) >= len(ARCHITECTURES)
