"""The main job as a user starts it: the deepspeed launcher, the reference model, two real ranks."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from rich.console import Console

from examples import generation
from pikv_ds import ConfigError, launch_env
from pikv_ds.launch_env import World

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
        (("--model", "nowhere"), ("--model nowhere", "no such folder")),
        (("--state", "nowhere/run.state"), ("nowhere/run.state", "there is no folder nowhere")),
    ],
)
def test_bad_input_is_one_line_on_every_rank(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    done = launch(*arguments, timeout=100)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert {line.split(":")[0] for line in lines} <= {"rank 0", "rank 1"}
    assert lines, done.stderr  # the launcher ends the other rank as soon as the first has failed
    assert all(word in line for line in lines for word in words)
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("checkpoint"), tiny.tokenizer()
    tiny.mixtral(vocab_size=len(tokenizer), max_position_embeddings=4096).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def arguments_of(*more: str) -> argparse.Namespace:
    return generation.parse_arguments(["--model", "DIR", *more], None, "", "")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty; write a prompt into it"),
        (b" \n\t", "is empty; write a prompt into it"),
        (b"\xff\xfe", "not a text in UTF-8"),
        (None, "No such file or directory"),
    ],
)
def test_prompt_files_that_hold_no_prompt_are_named(content: bytes | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"--prompt-file {path}: {words}"):
        generation.my_prompts(arguments_of("--prompt-file", str(path)), tiny.tokenizer(), World(0, 1, 0), 999)


def test_a_tokenizer_of_another_model_is_found(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("The whale~")
    args, tokenizer = arguments_of("--prompt-file", f"{tmp_path}/prompt.txt"), tiny.tokenizer()
    last = max(tokenizer("The whale~").input_ids)
    assert generation.my_prompts(args, tokenizer, World(0, 1, 0), last + 1)[0] == [tokenizer("The whale~").input_ids]
    with pytest.raises(ValueError, match=f"its tokenizer gives token {last}, the model has {last}"):
        generation.my_prompts(args, tokenizer, World(0, 1, 0), last)


@pytest.mark.parametrize(
    ("change", "value", "words"),
    [
        ("pikv", [1], r"ds\.json: pikv: expected an object with settings, got \[1\]"),
        ("pikv", {"slab_pages": 0}, r"ds\.json: pikv\.slab_pages = 0"),
    ],
)
def test_settings_are_changed_only_where_there_are_some(change: str, value: Any, words: str, tmp_path: Path) -> None:
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({change: value}))
    with pytest.raises(ConfigError, match=words):
        generation.read_config(arguments_of("--config", str(config), "--set", "codec=int8"))
    config.write_text("{}")
    changed = generation.read_config(
        arguments_of("--config", str(config), "--set", "codec=int8", "--set", "page_size=8")
    )
    assert changed == {"pikv": {"codec": "int8", "page_size": 8}}


def test_folders_of_results_are_no_part_of_the_settings(tmp_path: Path) -> None:
    """They are checked before a rank begins, whatever its configuration."""
    options = ("--state", f"{tmp_path}/nowhere/state", "--json", f"{tmp_path}/nowhere/x.json")
    assert "pikv" in generation.read_config(arguments_of(*options))


def test_nothing_compared_is_not_all_equal() -> None:
    """A job that is stopped compares nothing."""
    assert "nothing was compared" in generation.verdict(0, 0)
    assert "equal" not in generation.verdict(0, 0)
    assert generation.verdict(5, 5).startswith("5 of 5 [green]all equal")
    assert generation.verdict(4, 5).startswith("4 of 5 [red]DIFFERENT")


def test_errors_begin_a_line_of_their_own() -> None:
    """Also where an answer was being streamed."""
    out = io.StringIO()
    questions, ids = ["[/] Why?"], tiny.tokenizer()("Because").input_ids
    stream = generation.Stream(Console(file=out, width=80), tiny.tokenizer(), questions, ["It is "])
    stream.show(ids[:3])
    stream.show(ids)
    assert out.getvalue() == "\n[/] Why?\nIt is B e c a u s e"
    stream.close()
    stream.close()
    assert out.getvalue().endswith("B e c a u s e\n")


def test_a_job_that_breaks_off_ends_its_line(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("The whale swam on and on. " * 4)
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from examples import deepspeed_generate as example

put = example.Watch.put

def break_off(self, value):
    put(self, value)
    if self.count == 5:
        raise OSError("no more")

example.Watch.put = break_off
sys.exit(example.main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", script, "--model", str(checkpoint), "--prompt-file", f"{tmp_path}/prompt.txt"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100, check=False
    )
    assert done.returncode == 2, done.stdout
    assert [line for line in done.stdout.splitlines() if "no more" in line] == ["rank 0: error: no more"]


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
