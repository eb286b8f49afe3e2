"""The processes of a job: how they end when one fails, and when the job is asked to end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

START = """
import sys
from pikv_ds.tools import local_ranks as ranks
sys.exit(ranks.run([sys.executable, "-c", sys.argv[1]], 2))
"""

WAIT = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
signal.signal(signal.SIGTERM, lambda *_: {end})
text = f"ready {{os.environ['WORLD_SIZE']}} {{os.environ['LOCAL_RANK'] == str(rank)}}\\n"
os.write(1, text.encode())  # at once: both ranks write to one pipe
time.sleep(60)
sys.exit(9)
"""


def job(code: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", START, code], stdout=pipe, stderr=pipe, text=True)


def ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for _ in range(2):
        assert process.stdout.readline() == "ready 2 True\n"


def test_a_job_ends_well_when_all_ranks_do() -> None:
    assert job("").wait(60) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_the_ranks_once_as_sigterm(number: int) -> None:
    process = job(WAIT.format(end="sys.exit(0)"))
    ready(process)
    process.send_signal(number)
    assert process.wait(20) == 0


def test_a_second_signal_kills() -> None:
    process = job(WAIT.format(end="os.write(1, b'asked\\n')"))
    ready(process)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert {process.stdout.readline() for _ in range(2)} == {"asked\n"}
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    ("death", "code", "words"),
    [
        ("sys.exit(5)", 5, "rank 1 ended with exit code 5"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "rank 1 was killed by SIGKILL (out of memory?)"),
    ],
)
def test_a_rank_that_fails_ends_the_others(death: str, code: int, words: str) -> None:
    started = time.monotonic()
    process = job(f"import os, signal, sys, time\nif os.environ['RANK'] == '1': {death}\ntime.sleep(60)")
    _, errors = process.communicate(timeout=50)
    assert process.returncode == code
    assert words in errors
    assert time.monotonic() - started < 50
