"""benchmarks/readings.py, which makes the tables of docs/numbers.md, runs: two ranks, a tiny model, short prompts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from pikv_ds import launch_env

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("model"), tiny.tokenizer()
    tiny.mixtral(vocab_size=len(tokenizer), max_position_embeddings=8192).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("parity", ["1,486 │ all equal", "706 │ all equal"]),
        ("bound", [" ok "]),
        ("wire", ["528.0 │     528"]),
        ("memory", ["MiB"]),
        ("speed", ["cpp"]),
        ("rotation", ["× 1 ", "× 64", "yes"]),
    ],
)
def test_a_reading(what: str, words: list[str], model: Path) -> None:
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    port = ["--master_port", str(launch_env.free_port())]
    command = [launcher, "--num_accelerators", "2", *port, "benchmarks/readings.py", what, "--model", str(model)]
    command += ["--tokens", "1500", "--new-tokens", "8"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for word in words:
        assert word in done.stdout, done.stdout[-3000:]
