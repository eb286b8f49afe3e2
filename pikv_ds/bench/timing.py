"""Interleaved timing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch


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

    @property
    def gb_per_s(self) -> float:
        """Bytes moved per second, in 10^9."""
        return self.num_bytes / self.seconds / 1e9


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
    turn = [0] * len(contenders)
    for number in track(range(rounds + 1)):  # the first round warms up
        for n in threads:
            torch.set_num_threads(n)
            for i, contender in enumerate(contenders):
                took = _once(contender, turn[i] % contender.num_copies, device)
                turn[i] += 1
                if number:
                    samples[i, n].append(took)
    torch.set_num_threads(before)
    timings = []
    for (i, n), seconds in samples.items():
        median = statistics.median(seconds)
        low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (median,) * 3
        contender = contenders[i]
        timings.append(Timing(contender.name, contender.group, n, median, (high - low) / median, contender.num_bytes))
    return timings


def _once(contender: Contender, copy: int, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        contender.run(copy)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    contender.run(copy)
    return time.perf_counter() - begin
