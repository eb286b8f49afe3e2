"""The server's command line, up to where ranks start."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("flask")
pytest.importorskip("hypercorn")
pytest.importorskip("prometheus_client")

from megatron_patch import compat, server
from pikv_ds.errors import PiKVError, UsageError

WHOLE = ("--ranks", "--tp", "--port", "--context-length", "--max-requests", "--max-queue", "--max-tokens")
REAL = ("--body-timeout", "--buffer-gib")
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_PROCID", "SLURM_STEP_ID",
             "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PIKV_LAUNCHER")  # fmt: skip


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No launcher's variables; what a test sets is taken back."""
    for name in LAUNCHERS:
        monkeypatch.setenv(name, "")  # so that what the code under test sets goes, too
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def the_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed: one line."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err.removesuffix("\n")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        (option, value)
        for option in WHOLE
        for value in ("nan", "inf", "-1", "1.5", "", "9" * 400, "\N{SUPERSCRIPT TWO}")
    ]
    + [(option, value) for option in REAL for value in ("nan", "inf", "-1", "0", "", "9" * 400, "1e9", "x")],
)
def test_numbers_have_bounds(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        server.main(["--model", "anywhere", f"{option}={value}"])
    assert ended.value.code == 2
    line = the_line(capsys)
    assert f"argument {option}: " in line
    assert ": use a " in line
    assert len(line) < 400


@pytest.mark.parametrize("option", ["--ranks", "--tp", "--context-length", "--max-requests", "--max-tokens"])
def test_counts_begin_at_1(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        server.main(["--model", "anywhere", option, "0"])
    assert f"argument {option}: 0: use a whole number of at least 1" in the_line(capsys)


def test_numbers_at_the_bounds() -> None:
    arguments = ["--port", "65535", "--max-queue", "0", "--body-timeout", "0.5", "--buffer-gib", "1e-3"]
    args = server.parse_arguments(["--model", "anywhere", *arguments])
    assert (args.port, args.max_queue, args.body_timeout, args.buffer_gib) == (65535, 0, 0.5, 0.001)


@pytest.mark.parametrize(
    "error",
    [
        UsageError("the shard is damaged:\n  layer 3"),
        PiKVError("the shard is damaged:\n  layer 3"),
        OSError("the shard is damaged:\n  layer 3"),
        compat.MegatronVersionError("the shard is damaged:\n  layer 3"),
    ],
)
@pytest.mark.parametrize(
    ("place", "start"),
    [
        ({}, "error: "),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "rank 0: error: "),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "rank 1: error: "),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
          "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "rank 1: error: "),
    ],
)  # fmt: skip
def test_every_rank_says_why_it_ends(
    place: dict[str, str], start: str, error: Exception, folder: Path, alone: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def run(*_: object) -> int:
        raise error

    for name, value in place.items():
        alone.setenv(name, value)
    alone.setattr(server, "run", run)
    assert server.main(["--model", str(folder)]) == 2
    assert the_line(capsys) == f"{start}the shard is damaged: layer 3"


def test_ranks_of_any_launcher_are_counted(folder: Path, alone: pytest.MonkeyPatch) -> None:
    """`srun` and `mpirun` have words of their own for the number of ranks, which --tp must divide."""
    place = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_NNODES": "1",
             "SLURM_STEP_TASKS_PER_NODE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # fmt: skip
    for name, value in place.items():
        alone.setenv(name, value)
    alone.setattr(server, "run", lambda *_: 0)
    assert server.main(["--model", str(folder), "--tp", "2"]) == 0


def test_variables_that_contradict_each_other_are_one_line(
    folder: Path, alone: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone.setenv("RANK", "two")
    assert server.main(["--model", str(folder)]) == 2
    assert the_line(capsys).startswith("error: WORLD_SIZE, LOCAL_RANK missing beside RANK=two")
