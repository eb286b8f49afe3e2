"""Steps one after the other, each in a process of its own with a limit, within the time of one call."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch  # once for all: steps run in forks of this process, which itself never touches CUDA

from benchmarks.gpu.results import Results
from benchmarks.gpu.sizes import FULL, TINY, Sizes
from pikv_ds.errors import UsageError

ALL_WELL, SOMETHING_FAILED, NOT_FINISHED, NOTHING_RAN = 0, 1, 3, 4
"""Exit codes; 2 is argparse's. A step's process ends with `NOT_FINISHED`, too, where its time is over."""
CASE_FAILED = 5
"""Exit code of a step's process whose case failed: another one goes on with the next case, as a GPU's context is
often beyond use then."""
CASE_SECONDS = 60
"""Most for a case."""
LEAST_SECONDS = 5
"""With less time left no step and no case is begun."""


@dataclass
class Worker:
    """What a step's work needs, in the step's process."""

    step: str
    results: Results
    call: int
    dry_run: bool
    deadline: float
    """Of `time.monotonic`: when the process will be stopped."""
    limit: float
    """Seconds that the step has."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry_run else "cuda")

    @property
    def sizes(self) -> Sizes:
        return TINY if self.dry_run else FULL

    @property
    def backend(self) -> str:
        """Of the ops that are looked at; never a slower one in their place, but in a dry run."""
        return "auto" if self.dry_run else "cpp"

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return self.results.folder

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def case(self, name: str, work: Callable[[], dict[str, Any]], seconds: int = CASE_SECONDS) -> None:
        """Does the work of one case and writes what it returns, unless that was done before.

        A case that raises, or takes longer than ``seconds``, ends the process: the next one begins after it. A case
        that failed in an earlier call is tried again.
        """
        before = self.results.cases(self.step).get(name)
        if before is not None and ("error" not in before or before["call"] == self.call):
            return
        if self.seconds_left < min(LEAST_SECONDS, self.limit / 10):
            sys.exit(NOT_FINISHED)
        about = {"step": self.step, "case": name, "call": self.call}
        self.results.append("begun", **about)
        signal.alarm(seconds)  # its default action ends the process, also within a call that waits for a GPU
        try:
            values = work()
        except Exception as error:
            traceback.print_exc()
            first = (str(error).strip().splitlines() or [""])[0]
            values = {"error": f"{type(error).__name__}: {first[:300]}"}
        signal.alarm(0)
        self.results.append("case", **about, **values)
        if "error" in values:
            sys.exit(CASE_FAILED)


@dataclass(frozen=True)
class Step:
    """A part of the run."""

    name: str
    what: str
    work: Callable[[Worker], None]
    seconds: float = math.inf
    """At most; infinite: all the time that is left, so it comes last."""
    program: str = ""
    """Must be on the path."""
    module: str = ""
    """Must be installed."""
    gpu: bool = False
    """Makes no sense on a CPU."""
    always: bool = False
    """It prepares the machine: first in every call, also in one that goes on with a folder, and needed by the rest."""

    def absent(self, dry_run: bool) -> str | None:
        """What is missing to make it, None if nothing is."""
        if self.gpu and dry_run:
            return "it needs a GPU"
        if self.program and shutil.which(self.program) is None:
            return f"{self.program} is not on the path"
        if self.module and importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        return None


def sees_gpu() -> bool:
    """Whether torch has a GPU here, asked in a process of its own: see the import of torch."""
    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(not torch.cuda.is_available()))
    process.start()
    process.join()
    return process.exitcode == 0


def run(folder: Path, steps: Sequence[Step], seconds: float, dry_run: bool, sources: str) -> int:
    """Makes those steps that a folder has no results of; returns an exit code.

    Args:
        seconds: of the whole call.
        sources: a digest of the code that is measured. A folder holds results of one code.

    Raises:
        ValueError: the folder has results of something else.
    """
    deadline = time.monotonic() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder)
    calls = results.records("call")
    for key, mine in (("sources", sources), ("dry_run", dry_run)):
        if calls and calls[-1][key] != mine:
            raise UsageError(
                f"--out {folder}: has results with {key} = {calls[-1][key]!r}, but this call has {mine!r}; "
                "name another folder"
            )
    call = len(calls) + 1
    date = datetime.now(UTC).isoformat(timespec="seconds")
    results.append("call", number=call, date=date, sources=sources, dry_run=dry_run)
    before = results.steps()

    def order(step: Step) -> tuple[bool, bool, bool]:
        """What has given trouble before comes after the rest, but for what the rest needs."""
        troubled = before.get(step.name, {}).get("state") in ("failed", "stopped")
        return not step.always, step.seconds == math.inf, troubled

    for step in sorted(steps, key=order):
        well = False
        if not step.always and _finished(results, step):
            print(f"{step.name:15} done before", flush=True)
        elif reason := step.absent(dry_run):
            state = "failed" if step.always else "absent"
            results.append("step", step=step.name, call=call, state=state, reason=reason)
            print(f"{step.name:15} left out: {reason}", flush=True)
        elif deadline - time.monotonic() < min(LEAST_SECONDS, seconds / 10):
            print(f"{step.name:15} no time left", flush=True)
        else:
            print(f"{step.name:15} {step.what} …", flush=True)
            began = time.monotonic()
            state, reason = _perform(results, step, call, dry_run, deadline)
            took = round(time.monotonic() - began, 1)
            results.append("step", step=step.name, call=call, state=state, reason=reason, seconds=took)
            print(f"{'':15} {state} after {took} s{': ' * bool(reason)}{reason}", flush=True)
            well = state == "done" and not reason
        if step.always and not well:
            print(f"the run ends here: nothing may be measured without {step.name}", flush=True)
            break
    return _exit_code(results, steps)


def _finished(results: Results, step: Step) -> bool:
    retry = any("error" in case for case in results.cases(step.name).values())
    return results.steps().get(step.name, {}).get("state") == "done" and not retry


def _exit_code(results: Results, steps: Sequence[Step]) -> int:
    states = [results.steps().get(step.name, {}).get("state", "cut") for step in steps]
    if {"failed", "stopped"} & set(states) or any(results.failures(step.name) for step in steps):
        return SOMETHING_FAILED
    if "cut" in states:
        return NOT_FINISHED
    asked = [state for step, state in zip(steps, states, strict=True) if not step.always]
    return NOTHING_RAN if asked and set(asked) == {"absent"} else ALL_WELL


def _perform(results: Results, step: Step, call: int, dry_run: bool, deadline: float) -> tuple[str, str]:
    """How a step ended, and why: "done", "failed", "stopped" at its limit, or "cut", to be gone on with."""
    end = min(deadline, time.monotonic() + step.seconds)
    limit = end - time.monotonic()
    while True:
        code = _in_process(step.work, Worker(step.name, results, call, dry_run, end, limit))
        case = results.open_case(step.name, call)
        if code == NOT_FINISHED or (code is None and end == deadline):
            return "cut", "its time is over, another call goes on"
        if case is not None:
            if code is None:
                why = f"the step was stopped at its limit of {step.seconds:g} s"
            elif code == -signal.SIGALRM:
                why = "it took longer than a case may"
            else:
                why = f"the process ended with {ending(code)}"
            results.append("case", step=step.name, case=case, call=call, error=why)
        if code is None:
            return "stopped", f"it took longer than {step.seconds:g} s"
        if code == 0:
            return "done", "; ".join(results.failures(step.name))
        if case is None and code != CASE_FAILED:
            said = _last_line(results.folder / "log.txt") if code == 1 else ""  # an exception's
            return "failed", said or f"the process ended with {ending(code)}"


def _in_process(work: Callable[[Worker], None], worker: Worker) -> int | None:
    """Does a step's work in a forked process and session; its exit code, None if it had to be stopped."""
    process = multiprocessing.get_context("fork").Process(target=_child, args=(work, worker))
    process.start()
    assert process.pid is not None
    try:
        process.join(worker.seconds_left)
        return process.exitcode
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
        process.kill()
        process.join()


def _child(work: Callable[[Worker], None], worker: Worker) -> None:
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    log = os.open(worker.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = os.fdopen(log, "a", buffering=1)
    print(f"== {worker.step}", flush=True)
    if worker.dry_run:
        torch.set_num_threads(1)
    work(worker)


def ending(code: int) -> str:
    """A process's exit code, or the signal that it died of, in words."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""
