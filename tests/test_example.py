"""The main job as a user starts it: the deepspeed launcher, the reference model, two real ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pikv_ds import launch_env

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "deepspeed_generate.py"


def launch(*arguments: str, ranks: int = 2, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    port = launch_env.free_port()  # other jobs may use the launcher's default
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_accelerators", str(ranks), "--master_port", str(port), str(EXAMPLE), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def test_the_reference_model_generates_the_unsharded_models_tokens(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the reference model is read from a GGUF file")
    figures = tmp_path / "figures.json"
    done = launch(
        "--config", str(ROOT / "launch" / "ds_inference.json"), "--prompt-tokens", "700", "--max-new-tokens", "8",
        "--ignore-eos", "--verify", "--json", str(figures),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(figures.read_text())
    assert report["equal_tokens"] == report["verified_tokens"] == 16
    assert report["wire_bytes_per_token_layer"] == report["wire_formula_bytes"] > 0
    held = [rank["peak_tokens"] for rank in report["per_rank"]]
    assert sum(held) == sum(rank["peak_own_tokens"] for rank in report["per_rank"])
    assert min(held) > 0
    assert "skew" in done.stdout
    assert "all equal" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--set", "page_size=33"), ("pikv.page_size = 33", "choose one of 1, 8, 16")),
        (("--set", "codex=int8"), ("pikv.codex", 'did you mean "codec"')),
        (("--config", "nowhere.json"), ("nowhere.json", "no such file")),
        (("--model", "nowhere"), ("--model nowhere", "no config.json")),
    ],
)
def test_bad_input_is_one_line_on_every_rank(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    done = launch(*arguments, timeout=100)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert {line.split(":")[0] for line in lines} <= {"rank 0", "rank 1"}
    assert lines, done.stderr  # the launcher ends the other rank as soon as the first has failed
    assert all(word in line for line in lines for word in words)
    assert "Traceback" not in done.stderr


def test_help_shows_commands_that_work() -> None:
    done = subprocess.run([sys.executable, str(EXAMPLE), "--help"], capture_output=True, text=True, check=True)
    assert "deepspeed --num_accelerators 2 examples/deepspeed_generate.py" in done.stdout
    for option in ("--model", "--prompt-file", "--max-new-tokens", "--ranks", "--verify", "--json"):
        assert option in done.stdout


def test_a_question_needs_a_document() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--question", "Why?"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--prompt-file FILE" in done.stderr
