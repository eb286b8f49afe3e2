"""The command `pikv`: what it prints, and what it says about bad arguments."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pikv_ds import report
from pikv_ds.bench.attention import Setting, paged, torch_baselines
from pikv_ds.bench.timing import Contender, measure
from pikv_ds.cli import main
from pikv_ds.ops import OPS


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
    figures, picture = tmp_path / "new" / "figures.json", tmp_path / "picture.png"
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
        (["--budget", "0"], "--budget = 0.0: use a share of the pages"),
        (["--rounds", "0"], "--rounds = 0: use a whole number"),
        (["--codecs", "int4", "int3/int9"], "codec 'int3/int9': 'int9' is none of none, fp8, int8"),
        (["--codecs", "int3+clipped"], "codec 'int3+clipped': 'clipped' is none of"),
        (["--codecs", "none+clip"], "clip = True: is of integers"),
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
