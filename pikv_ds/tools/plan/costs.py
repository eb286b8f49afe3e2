"""`Costs`: what a decode pass of the sharded cache takes, as a sum of measured parts.

A pass over L layers on G ranks takes

    step + alpha + L * (layer + 2 * alpha + beta * wire + row * rows + sum over codecs of bytes / rate)

``alpha`` and ``beta`` are of one collective of the group (Hockney's model: a start-up time, and a time per byte that a
rank sends), ``wire`` the bytes that a rank sends at a layer, ``rows`` the queries that a rank answers there, its own
and the others', ``bytes`` what their pages have on a rank. The model's own work (projections, experts) is not in it.

`pikv plan --measure` fits them on this machine and keeps them in a file: one entry for each number of ranks and shape
of the attention, since ranks on one machine share its memory bandwidth.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pikv_ds import checks
from pikv_ds.core.shape import ModelShape
from pikv_ds.errors import UsageError


@dataclass(frozen=True)
class Work:
    """What a rank has to do in a decode pass."""

    layers: int
    rows: float
    """Queries that it answers at each layer, its own and the others'."""
    wire: float
    """Bytes that it sends at each layer."""
    pages: Mapping[str, float]
    """Bytes of pages that it reads at each layer, by codec."""


@dataclass(frozen=True)
class Costs:
    """In seconds; of a machine or of one group of its ranks."""

    alpha: float
    """Per collective."""
    beta: float
    """Per byte that a rank sends in one."""
    step: float
    """Of the host, per pass: the step plan, tables, and what is sealed now and then."""
    layer: float
    """Of the host, per layer."""
    row: float
    """Per layer and query: its tail, its way through the pages' tables, merging."""
    byte: dict[str, float] = field(default_factory=dict)
    """Per byte of pages that is read, by codec."""
    errors: list[float] = field(default_factory=list)
    """Predicted over measured, less 1, of loads that were not fitted."""

    def seconds(self, work: Work) -> float:
        """What a pass takes.

        Raises:
            ValueError: a codec was not measured.
        """
        unknown = [codec for codec in work.pages if codec not in self.byte]
        if unknown:
            raise UsageError(f"codec {unknown[0]} was not measured, only {', '.join(self.byte)}; pikv plan --measure")
        reading = sum(num_bytes * self.byte[codec] for codec, num_bytes in work.pages.items())
        network = 2 * self.alpha + self.beta * work.wire
        return self.step + self.alpha + work.layers * (self.layer + network + self.row * work.rows + reading)


def fit(alpha: float, beta: float, measured: Sequence[tuple[Work, float]]) -> Costs:
    """The costs that explain measured passes best, by least squares of relative errors, none below zero.

    Args:
        alpha, beta: of the network, measured by themselves.
        measured: what was to do, and how many seconds it took.
    """
    codecs = sorted({codec for work, _ in measured for codec in work.pages})
    rows, wanted = [], []
    for work, seconds in measured:
        layers = work.layers
        parts = [1.0, layers, layers * work.rows, *(layers * work.pages.get(codec, 0.0) for codec in codecs)]
        network = alpha + layers * (2 * alpha + beta * work.wire)
        rows.append([part / seconds for part in parts])
        wanted.append((seconds - network) / seconds)
    matrix, target = torch.tensor(rows, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64)
    scale = matrix.abs().amax(0).clamp(min=1e-300)  # bytes and seconds differ by ten orders of magnitude
    step, layer, row, *per_byte = (nonnegative(matrix / scale, target) / scale).tolist()
    return Costs(alpha, beta, step, layer, row, dict(zip(codecs, per_byte, strict=True)))


def nonnegative(matrix: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The x of no negative element that brings ``matrix @ x`` closest to the target (Lawson and Hanson 1974).

    Args:
        matrix, target: float64 ``[n, m]`` and ``[n]``.
    """
    width = matrix.shape[1]
    x = torch.zeros(width, dtype=matrix.dtype)
    free = torch.zeros(width, dtype=torch.bool)
    for _ in range(10 * width):
        gradient = matrix.T @ (target - matrix @ x)
        gradient[free] = -torch.inf
        if free.all() or float(gradient.max()) <= 1e-12:
            break
        free[gradient.argmax()] = True
        while True:
            best = torch.zeros_like(x)
            best[free] = torch.linalg.lstsq(matrix[:, free], target[:, None]).solution[:, 0]
            if not (best[free] <= 0).any():
                break
            falling = free & (best <= 0)
            step = float((x[falling] / (x[falling] - best[falling])).min())
            x = x + step * (best - x)
            free &= x > 1e-15
        x = best
    return x


def key_of(shape: ModelShape, page_size: int, ranks: int, device: str) -> str:
    """Under which a file keeps costs: what they depend on beside the load."""
    heads = f"{shape.num_heads}x{shape.num_kv_heads}x{shape.head_dim}"
    dtype = str(shape.dtype).removeprefix("torch.")
    return f"{device}, {ranks} ranks, heads {heads}, {dtype}, pages of {page_size}"


def load(path: Path) -> dict[str, Costs]:
    """A file's costs by their keys; none where there is no file.

    Raises:
        ValueError: it is no such file.
    """
    if not path.exists():
        return {}
    try:
        return {key: _entry(**entry) for key, entry in checks.read_json(path).items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{path}: not a file of costs ({checks.one_line(error)}); remove it and run pikv plan --measure"
        ) from None


def _entry(**values: Any) -> Costs:
    """An entry of the file, its numbers checked.

    Raises:
        TypeError, ValueError: it is none.
    """
    entry = Costs(**values)
    numbers = [entry.alpha, entry.beta, entry.step, entry.layer, entry.row, *entry.byte.values()]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < math.inf:
            raise UsageError(f"{checks.shown(number)} is no cost")
    return entry


def save(path: Path, costs: Mapping[str, Costs]) -> None:
    """Writes a file of costs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries: dict[str, Any] = {key: asdict(entry) for key, entry in costs.items()}
    path.write_text(json.dumps(entries, indent=1) + "\n")
