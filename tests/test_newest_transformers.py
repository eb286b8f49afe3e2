"""The Hugging Face tests with the newest transformers, which `make test` installs into a folder of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints-newest.txt"
FOLDER = Path(sys.prefix) / "newest"

FILES = {
    "tests/test_hf_single.py": 160,
    "tests/test_hf_ownership.py": 60,
    "tests/test_hf_families.py": 30,
    "tests/test_hf_fidelity.py": 40,
    "tests/test_checkpoints.py": 20,
    "tests/distributed/test_two_ranks.py": 100,
    "tests/distributed/test_two_ranks_models.py": 20,
}
"""What runs, and at least how many tests of each must pass."""


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Of a Python that imports the newest transformers."""
    if not FOLDER.is_dir():
        pytest.skip(f"no {FOLDER}: `make test` makes it, or pip install --no-deps --target {FOLDER} -r {CONSTRAINTS}")
    wanted = dict(re.findall(r"^([a-z]+)==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER), str(ROOT)]), "PYTHONWARNINGS": "ignore"}
    code = "import transformers, tokenizers; print(transformers.__version__, tokenizers.__version__)"
    python = [sys.executable, "-c", code]
    versions = subprocess.run(python, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert versions.stdout.split() == [wanted["transformers"], wanted["tokenizers"]]
    return environment


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("file", FILES)
def test_a_file_of_hugging_face_tests(file: str, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", file]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stdout[-8000:]}\n{run.stderr[-2000:]}"
    passed = re.search(r"(\d+) passed", run.stdout.strip().splitlines()[-1])
    assert passed is not None
    assert int(passed[1]) >= FILES[file]
