"""The command `pikv`: what it prints, and what it says about bad arguments."""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import extension, timings
from pikv_ds.config import ConfigError
from pikv_ds.errors import LaunchError, PoolFullError, UsageError
from pikv_ds.integrations.hf.cache import UnsupportedModelError
from pikv_ds.integrations.hf.checkpoints import CheckpointError
from pikv_ds.integrations.routers import UnknownRouterError
from pikv_ds.ops import OPS
from pikv_ds.tools import report
from pikv_ds.tools.bench.attention import Setting, paged, torch_baselines
from pikv_ds.tools.bench.timing import Contender, measure
from pikv_ds.tools.cli import main
from pikv_ds.tools.command_line import guarded, real, tokens, whole

ROOT = Path(__file__).resolve().parents[1]


def test_report_names_each_op_and_each_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["ops"]["cpu"]) == set(OPS)
    assert {"cpp on cpu", "triton on cpu", "cpp on cuda", "triton on cuda"} == set(facts["backends"])
    assert main(["report"]) == 0
    text = capsys.readouterr().out
    assert all(op in text for op in OPS)
    assert "\x1b" not in text  # plain in a pipe


def test_report_knows_what_is_installed() -> None:
    found = report.software()
    assert found["torch"].version == torch.__version__
    assert found["deepspeed"].ok
    assert found["transformers"].version == importlib.metadata.version("transformers")
    for name in ("megatron-core", "mpi4py", "NVIDIA apex", "NCCL", "CUDA", "SLURM", "mpirun"):
        assert found[name].version or found[name].note, name
    assert not torch.cuda.is_available() or found["NCCL"].ok


def test_versions_out_of_range_are_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: "4.9" if n == "transformers" else version(n))
    found = report.software()["transformers"]
    assert (found.version, found.ok) == ("4.9", False)
    assert "PiKV wants" in found.note


@pytest.mark.parametrize("inside", ["multi_tensor_apply", "interfaces"])
def test_the_other_apex_is_not_nvidias(inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex" / inside).mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    found = report.nvidia_apex()
    assert found.ok == (inside == "multi_tensor_apply")
    assert found.ok or "not NVIDIA's" in found.note


@pytest.mark.parametrize("op", ["decode", "lookup", "seal"])
def test_bench_writes_its_figures(op: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    small = [
        "--gib",
        "0.001",
        "--rounds",
        "2",
        "--context",
        "256",
        "--codecs",
        "int4",
        "int3/int2+clip",
        "--kv-heads",
        "1",
    ]
    drawn = [] if op == "seal" else ["--plot", str(picture)]
    assert main(["bench", "--op", op, *small, "--heads", "2", "--json", str(figures), *drawn]) == 0
    results = json.loads(figures.read_text())["results"]
    assert all(any(codec in r["contender"] for r in results) for codec in ("int4", "int3/int2+clip"))
    assert all(r["median_s"] > 0 and r["gb_per_s"] > 0 for r in results)
    assert "int4" in capsys.readouterr().out
    assert op == "seal" or picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--heads", "7", "--kv-heads", "2"], "--heads = 7: must be a multiple of --kv-heads = 2"),
        (["--context", "1000"], "--context = 1000: use a multiple of --page-size = 32"),
        (["--op", "seal", "--plot", "x.png"], "--plot: draws figures against context"),
        (["--budget", "0"], "--budget: 0: use a share of the pages"),
        (["--rounds", "0"], "--rounds: 0: use a whole number"),
        (["--codecs", "int4", "int3/int9"], "codec 'int3/int9': 'int9' is none of none, fp8, int8"),
        (["--codecs", "int3+clipped"], "codec 'int3+clipped': 'clipped' is none of"),
        (["--codecs", "none+clip"], "clip = True: only integer codecs have it"),
        (["--json", "nowhere/x.json"], "nowhere/x.json: there is no folder nowhere"),
        (["--plot", "nowhere/x.png"], "nowhere/x.png: there is no folder nowhere"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_contenders_take_turns_and_walk_through_their_copies() -> None:
    setting = Setting(2, 1, 64, 32, working_set=1 << 18)
    contenders = [*torch_baselines(setting, 256), paged(setting, 256, "int4", "auto")]
    seen: list[tuple[str, int]] = []

    def watched(contender: Contender) -> Contender:
        return replace(contender, run=lambda i: (seen.append((contender.name, i)), contender.run(i)))

    contenders = [watched(contender) for contender in contenders]
    timings = measure(contenders, [1], 3, setting.device)
    assert [name for name, _ in seen[:6]] == [c.name for c in contenders] * 2
    assert [i for name, i in seen if name == contenders[0].name] == [0, 1, 2, 3]
    assert [t.name for t in timings] == [c.name for c in contenders]
    pages = contenders[-1]
    assert pages.num_copies * pages.num_bytes >= setting.working_set


# -- arguments and errors of all commands ------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "--model", "mixtral-8x7b", "--gib", "nan"], "--gib: nan: use a size above 0"),
        (["plan", "--model", "mixtral-8x7b", "--gib", "1e999"], "--gib: 1e999: use a size above 0"),
        (["plan", "--model", "mixtral-8x7b", "--context", "9" * 400], "is no number of tokens up to"),
        (["plan", "--model", "mixtral-8x7b", "--batch", "9" * 5000], "use a whole number of at least 1"),
        (
            ["plan", "--model", "mixtral-8x7b", "--ranks", "1000000000"],
            "--ranks: 1000000000: use a whole number of at",
        ),
        (["plan", "--model", "mixtral-8x7b", "--assume", "{"], "--assume {: is of --simulate TRACE"),
        (["plan", "--model", "mixtral-8x7b", "--assume", "{", "--simulate", "x"], "--assume {: line 1, column 2"),
        (["plan", "--model", "mixtral-8x7b", "--pikv", "[1]"], "--pikv [1]: line 1"),
        (["plan", "--model", "mixtral-8x7b", "--pikv", "x=[1]"], "write a JSON object, or NAME=JSON object"),
        (["plan", "--model", "mixtral-8x7b", "--pikv", "{" * 99999], "nested too deeply|line 1, column 2"),
        (["bench", "--threads", "0"], "--threads: 0: use a whole number of at least 1"),
        (["bench", "--device", "abacus"], "--device: abacus: "),
        (["bench", "--page-size", "0"], "--page-size: 0: use a whole number of at least 1"),
        (["bench", "--gib", "inf"], "--gib: inf: use a size above 0 and at most"),
        (["codecs", "--page-size", "0"], "--page-size: 0: use a whole number of at least 1"),
        (["codecs", "--codec", "{"], "--codec {: line 1, column 2"),
        (["eval", "--seed", "-1"], "--seed: -1: use a whole number of at least 0"),
        (["eval", "--pikv", "x={"], "--pikv x={: line 1, column 2"),
        (["tune", "--out", "x.json", "--objective", "9**9**9*latency"], "it has no value at"),
        (["heads", "--out", "x.json", "--share", "nan"], "--share: nan: use a share of the heads"),
        *(
            ([*command, "x.doc"], f"{command[-1]}: x.doc: use a name that ends in .png, .pdf, .svg")
            for command in (
                ["bench", "--plot"],
                ["eval", "--plot"],
                ["tune", "--plot"],
                ["heads", "--plot"],
                ["plan", "--plot"],
                ["trace", "plot", "x", "--out"],
            )
        ),
        (["nothing"], "invalid choice"),
    ],
)
def test_bad_arguments_of_any_command_are_a_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pikv")
    assert re.search(words if "|" in words else re.escape(words), line)
    assert len(line) < 1200


def test_every_number_on_the_command_line_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """No option is a bare `int` or `float`, which take 0, nan and numbers of any length."""
    found: dict[str, argparse.Action] = {}
    add = argparse.ArgumentParser.add_argument

    def watch(self: argparse.ArgumentParser, *names: str, **settings: Any) -> argparse.Action:
        action = add(self, *names, **settings)
        found[f"{self.prog} {names[0]}"] = action
        return action

    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", watch)
    assert main(["--version"]) == 0
    for script in (gpu.main, extension.main, timings.main):
        monkeypatch.setattr(sys, "argv", ["benchmarks", "--help"])
        with pytest.raises(SystemExit):
            script()
    assert {"benchmarks/gpu.sh --minutes", "benchmarks --architectures", "benchmarks --tokens"} <= set(found)
    assert {name.split()[1] for name in found} >= {"bench", "plan", "eval", "codecs", "calibrate", "tune", "heads"}
    assert len([a for a in found.values() if a.type is not None]) > 30
    assert not [name for name, action in found.items() if action.type in (int, float)]


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "-1", "1e3", "9" * 5000, "\u00b2", "\u0663", "1\n2", "0x10"])
def test_types_of_options_refuse_what_is_no_number(text: str) -> None:
    for kind in (whole(), real(0, 1, "use a share"), tokens):
        with pytest.raises(argparse.ArgumentTypeError) as error:
            kind(text)
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 300


def test_types_of_options_take_their_bounds() -> None:
    assert [whole(0, 5)(x) for x in ("0", "5")] == [0, 5]
    assert [real(0, 1, "")(x) for x in ("0", "1", "0.5")] == [0.0, 1.0, 0.5]
    assert [tokens(x) for x in ("1", "4k", "4K", "4096")] == [1, 4096, 4096, 4096]
    with pytest.raises(argparse.ArgumentTypeError, match="at most 5"):
        whole(0, 5)("6")
    with pytest.raises(argparse.ArgumentTypeError, match="above 0"):
        real(0, 1, "use a share above 0", above=True)("0")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UsageError("--x 1:\n  use 2\n"), "cmd: --x 1: use 2"),
        (UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range"), "cmd: 'ascii' codec can't encode"),
        (PoolFullError("no room"), "cmd: no room"),
        (OSError(28, "No space left on device"), "cmd: [Errno 28] No space left on device"),
        (MemoryError(), "cmd: MemoryError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "cmd: DefaultCPUAllocator: can't"),
        (UsageError("x" * 10**6), "cmd: xxx"),
    ],
)
def test_known_errors_are_a_line(error: Exception, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        raise error

    assert guarded("cmd", work) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(words)
    assert len(line) < 1200


def test_our_own_mistakes_are_not_hidden() -> None:
    for error in (ValueError("unequal"), RuntimeError("shapes differ"), AssertionError(), KeyError("x"), TypeError()):
        with pytest.raises(type(error)):
            guarded("cmd", lambda error=error: (_ for _ in ()).throw(error))


def test_whatever_refuses_input_is_known() -> None:
    """Nothing raises a bare ValueError on purpose, and every error class for input is a `UsageError`."""
    sources = [p for folder in ("pikv_ds", "examples", "megatron_patch") for p in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 80
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            raised = node.exc.func if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) else None
            assert not (isinstance(raised, ast.Name) and raised.id == "ValueError"), f"{path}:{node.lineno}"
    for kind in (ConfigError, CheckpointError, LaunchError, UnsupportedModelError, UnknownRouterError):
        assert issubclass(kind, UsageError)


@pytest.mark.parametrize(("closed", "words"), [(">&-", "standard output is closed"), ("> /dev/full", "No space left")])
def test_a_closed_or_full_output_is_a_line(closed: str, words: str) -> None:
    command = f"{sys.executable} -m pikv_ds.tools.cli plan --model mixtral-8x7b {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "WARNING" not in line]
    assert line.startswith("pikv plan: ")
    assert words in line
