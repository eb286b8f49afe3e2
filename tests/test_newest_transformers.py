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

FILES = [
    "tests/test_hf_single.py",
    "tests/test_hf_ownership.py",
    "tests/test_hf_families.py",
    "tests/test_checkpoints.py",
    "tests/distributed/test_two_ranks.py",
    "tests/distributed/test_two_ranks_models.py",
]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_hugging_face_tests() -> None:
    wanted = dict(re.findall(r"^([a-z]+)==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE))
    if not FOLDER.is_dir():
        pytest.skip(f"no {FOLDER}: `make test` makes it, or pip install --no-deps --target {FOLDER} -r {CONSTRAINTS}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER), str(ROOT)]), "PYTHONWARNINGS": "ignore"}
    code = "import transformers, tokenizers; print(transformers.__version__, tokenizers.__version__)"
    python = [sys.executable, "-c", code]
    versions = subprocess.run(python, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert versions.stdout.split() == [wanted["transformers"], wanted["tokenizers"]]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", *FILES]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    summary = run.stdout.strip().splitlines()[-1]
    print(f"transformers {wanted['transformers']}: {summary}")
    assert run.returncode == 0, f"{run.stdout[-8000:]}\n{run.stderr[-2000:]}"
    passed = re.search(r"(\d+) passed", summary)
    assert passed is not None
    assert int(passed[1]) > 300
