"""One process per rank on this machine, watched until the last has ended.

torchrun does this, too, but ends with an error whenever it is stopped by a signal, and gives the
ranks 30 seconds to finish.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from pikv_ds import launch_env

POLL_SECONDS = 0.1
GRACE_SECONDS = 3.0
"""How long the other ranks may report, once one has failed, before they are killed: what they wait
for will not come."""


def run(command: Sequence[str], count: int) -> int:
    """Runs a command as `count` ranks.

    SIGTERM, SIGINT and SIGHUP are passed on as SIGTERM, and the ranks end in their own time; at a
    second one they are killed. When a rank fails, so are the others.

    Returns:
        The exit code of the job: 0 if all ranks ended with 0.
    """
    port = launch_env.free_port()
    ranks: list[subprocess.Popen[bytes]] = []
    asked = 0

    def stop(*_: object) -> None:
        nonlocal asked
        asked += 1
        for process in ranks:
            _send(process, signal.SIGTERM if asked == 1 else signal.SIGKILL)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    for rank in range(count):
        environment = launch_env.rank_environment(rank, count, port)
        # A session of its own: Ctrl-C reaches the ranks once, through us.
        ranks.append(subprocess.Popen(command, env=environment, start_new_session=True))
        if asked:
            _send(ranks[-1], signal.SIGTERM)
    failed, deadline = 0, float("inf")
    while any(process.poll() is None for process in ranks):
        time.sleep(POLL_SECONDS)
        for rank, process in enumerate(ranks):
            if process.poll() and not failed:
                failed, deadline = process.returncode, time.monotonic() + GRACE_SECONDS
                if asked < 2:
                    print(f"error: rank {rank} {_ending(failed)}; ending the others", file=sys.stderr, flush=True)
        if time.monotonic() > deadline:
            for process in ranks:
                _send(process, signal.SIGKILL)
    code = failed or next((process.returncode for process in ranks if process.returncode), 0)
    return 128 - code if code < 0 else code


def _send(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
