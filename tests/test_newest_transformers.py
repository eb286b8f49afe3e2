"""The Hugging Face tests with the newest transformers, which `make test` installs into a folder of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints-newest.txt"
FOLDER = Path(sys.prefix) / "newest"

FILES = {
    "test_hf_single": 85,
    "test_hf_ownership": 60,
    "test_hf_families": 30,
    "test_hf_fidelity": 40,
    "test_checkpoints": 20,
    "distributed/test_generate": 30,
    "distributed/test_attach": 10,
    "distributed/test_codecs_and_lookups": 5,
    "distributed/test_errors": 40,
    "distributed/test_invariants": 10,
    "distributed/test_models": 20,
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


@pytest.fixture(scope="module")
def outcomes(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """How each test ended, by file: one process for all, which imports everything and starts ranks once."""
    report = tmp_path_factory.mktemp("newest") / "report.xml"
    files = [f"tests/{name}.py" for name in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *files]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert report.is_file(), f"{run.stdout[-8000:]}\n{run.stderr[-2000:]}"
    found: dict[str, dict[str, Any]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = [x.text for x in case if x.tag in ("failure", "error")]
        skipped = any(x.tag == "skipped" for x in case)
        name = case.get("classname", "").removeprefix("tests.").replace(".", "/")
        found.setdefault(name, {})[case.get("name", "")] = "\n".join(map(str, wrong)) or (
            "skipped" if skipped else None
        )
    assert run.returncode in (0, 1), f"{run.stdout[-8000:]}\n{run.stderr[-2000:]}"
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("file", FILES)
def test_a_file_of_hugging_face_tests(file: str, outcomes: dict[str, dict[str, Any]]) -> None:
    wrong = {name: text for name, text in outcomes[file].items() if text not in (None, "skipped")}
    assert not wrong, "\n".join(f"{name}:\n{text[-3000:]}" for name, text in wrong.items())
    assert sum(text is None for text in outcomes[file].values()) >= FILES[file]
