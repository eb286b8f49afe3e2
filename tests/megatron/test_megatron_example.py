"""The Megatron example as a user starts it: torchrun, the reference model, two real ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("gguf", reason="the reference model is read from a GGUF file")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "megatron_generate.py"
pytestmark = pytest.mark.distributed


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE), "--ranks", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.slow
def test_the_reference_model_generates_the_unsharded_models_tokens(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    done = launch(
        "--prompt-tokens", "700", "--max-new-tokens", "8", "--ignore-eos", "--verify", "--json", str(figures)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(figures.read_text())
    assert report["equal_tokens"] == report["verified_tokens"] == 16
    # In a pass that serves one rank only, the other sends padding: of 16 queries two at the most.
    assert 0 < report["wire_formula_bytes"] <= report["wire_bytes_per_token_layer"]
    assert report["wire_bytes_per_token_layer"] <= report["wire_formula_bytes"] * 16 / 14
    held = [rank["peak_tokens"] for rank in report["per_rank"]]
    assert sum(held) == sum(rank["peak_own_tokens"] for rank in report["per_rank"])
    assert min(held) > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--set", "page_size=33"), ("pikv.page_size = 33", "choose one of 1, 8, 16")),
        (("--model", "nowhere"), ("--model nowhere", "no such folder")),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    done = launch(*arguments)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("rank ")]
    assert len(lines) == 2  # every rank says it
    for line in lines:
        assert all(word in line for word in words)
    assert "Traceback" not in done.stderr
