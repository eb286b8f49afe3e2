"""Ranks as processes, and test functions inside them.

    ranks = Ranks(2)                        # or those of all files, which are started once: `ranks_fixture`
    results = ranks.run(function, x=1)      # function(rank, x=1) on every rank; results in rank order

Each call runs one function of a test module on all ranks at the same time. What it returns comes
back to the test, which asserts on it; what it raises is raised again, with the traceback and the
output of the rank that failed first. A case that hangs is ended at its time limit. After a failure
the ranks are started anew, so that one broken case does not take the next ones with it.

The processes are forked from a server that has imported torch, transformers and DeepSpeed once:
a set of ranks starts in a second instead of seven per rank. They end with the process that runs the
tests, however that ends and whatever they are in.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

from pikv_ds.launch_env import free_port

ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""What the processes need before they import anything."""

PRELOAD = [
    "torch.distributed",
    "deepspeed",
    "deepspeed.moe.layer",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.generation.streamers",
]
"""What they share. A folder of tests may add to it before the first ranks are started."""

START_SECONDS = 90.0
"""Limit for the processes to start and to find each other."""
GRACE_SECONDS = 10.0
"""How long the other ranks may take to report, once one has failed."""
GROUP_SECONDS = 30.0
"""Timeout of the world's process group. Shorter than a case's limit, so that a hanging collective
shows as an error with a traceback."""
OUTPUT_LINES = 25
"""Lines of a failing rank's output that are shown."""


class RankError(AssertionError):
    """A rank raised, died or hung. The message has the first error and every rank's output."""


class Ranks:
    """A set of processes, one per rank, that run functions together.

    Args:
        size: number of ranks.
        limit_s: most seconds that one call of `run` may take.
        join: make the world's gloo group beforehand; otherwise the ranks only get a launcher's
            environment variables.
    """

    def __init__(self, size: int, limit_s: float = 60.0, join: bool = True) -> None:
        self.size, self.limit_s, self.join = size, limit_s, join
        self.processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")

    def run(self, function: Callable[..., Any], **kwargs: Any) -> list[Any]:
        """Runs ``function(rank, **kwargs)`` on every rank; returns the results in rank order.

        Raises:
            RankError: a rank raised or died, or not all were done in time.
        """
        self.start()
        self.post(function, **kwargs)
        return self.collect(self.limit_s)

    def post(self, function: Callable[..., Any], **kwargs: Any) -> None:
        """Starts a function on every rank and returns at once; `collect` waits for it."""
        self.start()
        message = pickle.dumps((function, kwargs))
        for pipe in self._pipes:
            pipe.send_bytes(message)

    def collect(self, limit_s: float, may_die: tuple[int, ...] = ()) -> list[Any]:
        """What the ranks return.

        Args:
            may_die: ranks that the test kills; their result is None.
        """
        results: dict[int, Any] = dict.fromkeys(may_die)
        errors: list[str] = []
        deadline = time.monotonic() + limit_s
        while len(results) < self.size:
            missing = {self._pipes[r]: r for r in range(self.size) if r not in results}
            ready = wait(list(missing), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                silent = f"rank(s) {sorted(missing.values())} did not finish"
                errors.append(silent if errors else f"{silent} within {limit_s:g} s")
                break
            for pipe in ready:
                rank = missing[pipe]
                try:
                    good, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    self.processes[rank].join(5)
                    good, value = False, f"died with exit code {self.processes[rank].exitcode}"
                results[rank] = value
                if not good:
                    errors.append(f"rank {rank}: {value}")
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if errors:
            outputs = "".join(f"\n--- output of rank {r}\n{self.output(r)}" for r in range(self.size))
            self.stop()
            raise RankError("\n".join(errors) + outputs)
        if may_die:
            self.stop()
        return [results[r] for r in range(self.size)]

    def output(self, rank: int) -> str:
        """The last lines that a rank has printed in this case."""
        path = self._log(rank)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "\n".join(lines[-OUTPUT_LINES:])

    def start(self) -> None:
        """Starts the processes if they are not running."""
        if self.processes:
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        port = free_port()
        with environment(**ENVIRONMENT):
            for rank in range(self.size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_work,
                    args=(rank, self.size, port, self.join, theirs, str(self._log(rank))),
                    daemon=True,
                )
                process.start()
                theirs.close()
                self.processes.append(process)
                self._pipes.append(ours)
        self.collect(START_SECONDS)

    def kill(self, rank: int) -> None:
        """Ends a rank as the kernel or a cluster would."""
        os.kill(self.processes[rank].pid, signal.SIGKILL)

    def stop(self) -> None:
        """Ends all ranks, and what they have started."""
        for process in self.processes:
            for kill in (os.killpg, os.kill):  # it may not have a group yet
                with contextlib.suppress(ProcessLookupError):
                    kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join(10)
        for pipe in self._pipes:
            pipe.close()
        self.processes, self._pipes = [], []

    def close(self) -> None:
        """Ends all ranks and removes their outputs."""
        self.stop()
        self._folder.cleanup()

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name) / f"rank{rank}.log"


def ranks_fixture(size: int, kind: str = "") -> Any:
    """A fixture with ``size`` ranks, which all files of this process share that ask for the same kind."""

    @pytest.fixture
    def ranks() -> Ranks:
        return shared(size, kind)

    return ranks


@functools.cache
def shared(size: int, kind: str) -> Ranks:
    """Ranks that end with this process."""
    ranks = Ranks(size)
    atexit.register(ranks.close)
    return ranks


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Environment variables for processes that are started inside."""
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _work(rank: int, size: int, port: int, join: bool, pipe: Connection, log: str) -> None:
    """A rank: runs what comes through the pipe until it is closed."""
    os.setpgid(0, 0)  # a group of its own: Megatron's checkpoints start writers that never end by themselves
    threading.Thread(target=_end_with_the_tests, daemon=True).start()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import process_groups
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)

    def begin() -> None:
        if join:
            dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=GROUP_SECONDS))
            dist.barrier()

    _answer(pipe, begin)
    process_groups.watch()
    while True:
        try:
            function, kwargs = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        os.ftruncate(1, 0)
        _answer(pipe, function, rank, **kwargs)
        process_groups.destroy_those_of_caches()


def _end_with_the_tests() -> None:
    """A rank within a case would not see that its pipe has closed."""
    tests = multiprocessing.parent_process()
    assert tests is not None
    tests.join()
    os.killpg(0, signal.SIGKILL)


def _answer(pipe: Connection, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    try:
        answer = (True, function(*args, **kwargs))
    except BaseException:
        answer = (False, traceback.format_exc())
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send_bytes(pickle.dumps(answer))
