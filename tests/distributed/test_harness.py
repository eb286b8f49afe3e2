"""The ranks of these tests end with the process that started them, whatever they are in."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.distributed


def busy(rank: int, folder: str) -> None:
    """Never ends, and never looks at its pipe."""
    (Path(folder) / f"{rank}").write_text(str(os.getpid()))
    while True:
        time.sleep(1)


def start(folder: str) -> None:
    """The process that runs the tests; it waits for its ranks."""
    import harness

    harness.PRELOAD.clear()  # would take longer than the case
    harness.Ranks(2, join=False).run(busy, folder=folder)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are looked up as Linux has them")
def test_ranks_do_not_outlive_a_process_that_is_killed(tmp_path: Path) -> None:
    here = Path(__file__).parent
    paths = [str(here), str(here.parent)]
    code = f"import sys; sys.path[:0] = {paths}; import test_harness; test_harness.start({str(tmp_path)!r})"
    tests = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 100
    while len(list(tmp_path.iterdir())) < 2 or not all(path.read_text() for path in tmp_path.iterdir()):
        assert tests.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = psutil.Process(tests.pid).children(recursive=True)  # the ranks, and the server that forked them
    assert {int(path.read_text()) for path in tmp_path.iterdir()} < {process.pid for process in family}
    tests.send_signal(signal.SIGKILL)
    tests.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    assert not alive
