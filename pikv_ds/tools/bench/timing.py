"""Interleaved timing: on a GPU of CUDA graphs, whose replay holds no work of the host."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

REPLAY_SECONDS = 2e-3
"""A graph replays its contender for about so long, so that the launch of the graph itself does not count."""
MOST_CALLS = 64
"""Calls in a graph for that."""


@dataclass(frozen=True)
class Contender:
    """One way to do the work."""

    name: str
    run: Callable[[int], object]
    """Does the work once, on the given copy of the data."""
    num_copies: int
    num_bytes: int
    """Bytes that the work has to move: the floor."""
    group: str = ""
    """What it is compared within, such as a context length."""


@dataclass(frozen=True)
class Timing:
    """What one contender took."""

    name: str
    group: str
    threads: int
    seconds: float
    """Median."""
    spread: float
    """Distance of the quartiles, as a share of the median."""
    num_bytes: int
    clock: str = "host"
    """How it was taken: "host", "graph" (a CUDA graph replayed), or "events" (around calls that wait for the host, so
    no graph can hold them: the host's time is in it)."""

    @property
    def gb_per_s(self) -> float:
        """Bytes moved per second, in 10^9."""
        return self.num_bytes / self.seconds / 1e9


class Clock:
    """Takes the time of one contender, a call of it after the other over the copies of its data."""

    def __init__(self, contender: Contender, device: torch.device) -> None:
        self.contender = contender
        self.kind = "host"
        self._copies = itertools.cycle(range(contender.num_copies))
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 1
        if device.type == "cuda":
            self._prepare()

    def once(self) -> float:
        """Seconds per call."""
        if self.kind == "host":
            begin = time.perf_counter()
            self.contender.run(next(self._copies))
            return time.perf_counter() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self._calls

    def _run(self) -> None:
        for _ in range(self._calls):
            self.contender.run(next(self._copies))

    def _prepare(self) -> None:
        """Captures a graph that walks through all copies, or finds out that none can be captured."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what has to be compiled and loaded: a capture must not do that
            self._run()
        torch.cuda.current_stream().wait_stream(side)
        self.kind = "events"
        rough = min(self.once() for _ in range(2))
        self._calls = max(self.contender.num_copies, min(MOST_CALLS, round(REPLAY_SECONDS / rough)))
        self._run()  # all copies: Triton compiles anew for addresses that are aligned otherwise
        if waits_for_host(self.contender):
            return
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        self._graph, self.kind = graph, "graph"


def waits_for_host(contender: Contender) -> bool:
    """Whether a call on a GPU makes the host wait, as reading a tensor's values or making one from a list does.

    A capture that fails leaves torch's generators unusable, so this is found out before it.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        contender.run(0)
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def measure(
    contenders: Sequence[Contender],
    threads: Sequence[int],
    rounds: int,
    device: torch.device,
    track: Callable[[Iterable[int]], Iterable[int]] = lambda x: x,
) -> list[Timing]:
    """Medians over ``rounds`` rounds, in each of which every contender runs once per thread count.

    Args:
        track: wraps the rounds, for a progress bar.
    """
    before = torch.get_num_threads()
    samples: dict[tuple[int, int], list[float]] = {(i, n): [] for i in range(len(contenders)) for n in threads}
    clocks = [Clock(contender, device) for contender in contenders]
    for number in track(range(rounds + 1)):  # the first round warms up
        for n in threads:
            torch.set_num_threads(n)
            for i, clock in enumerate(clocks):
                took = clock.once()
                if number:
                    samples[i, n].append(took)
    torch.set_num_threads(before)
    timings = []
    for (i, n), seconds in samples.items():
        median = statistics.median(seconds)
        low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (median,) * 3
        one, spread = contenders[i], (high - low) / median
        timings.append(Timing(one.name, one.group, n, median, spread, one.num_bytes, clocks[i].kind))
    return timings
