"""Counts, tables and pictures of `pikv eval`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from pikv_ds.eval.run import Outcome


def wilson(hits: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927)."""
    if count == 0:
        return 0.0, 1.0
    share, square = hits / count, z * z
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Row:
    """One method on all cases of one task."""

    method: str
    family: str
    count: int
    hits: float | None
    interval: tuple[float, float] | None
    same: int
    bytes_per_token: float
    of_full: float
    milliseconds: float
    perplexity: float | None
    divergence: float | None
    agreement: float | None

    @property
    def share(self) -> float | None:
        return None if self.hits is None else self.hits / self.count


def rows(outcomes: Iterable[Outcome], task: str) -> list[Row]:
    """One row per method, in the order of the outcomes."""
    by_method: dict[str, list[Outcome]] = {}
    for o in outcomes:
        if o.task == task:
            by_method.setdefault(o.method, []).append(o)
    out = []
    for method, group in by_method.items():
        n, scores = len(group), [o.score for o in group if o.score is not None]
        times = sorted(o.seconds_per_token for o in group)
        losses = [o.loss for o in group if o.loss is not None]

        def mean(values: Sequence[float | None]) -> float | None:
            known = [v for v in values if v is not None]
            return sum(known) / len(known) if known else None

        loss = mean(losses)
        out.append(
            Row(
                method,
                group[0].family,
                n,
                sum(scores) if scores else None,
                wilson(sum(scores), n) if scores else None,
                sum(o.same_tokens for o in group),
                sum(o.bytes_per_token for o in group) / n,
                sum(o.bytes_per_token for o in group) / sum(o.full_bytes_per_token for o in group),
                times[n // 2] * 1e3,
                None if loss is None else math.exp(loss),
                mean([o.divergence for o in group]),
                mean([o.agreement for o in group]),
            )
        )
    return out


def cells(row: Row, task: str) -> list[str]:
    """A row's texts, under `head`."""
    if task == "text":
        assert row.perplexity is not None
        return [
            row.method,
            f"{row.perplexity:.3f}",
            f"{row.divergence:.4f}",
            f"{row.agreement:.1%}",
            f"{row.bytes_per_token:,.0f}",
            f"{row.of_full:.3f}",
        ]
    assert row.interval is not None
    low, high = row.interval
    assert row.hits is not None
    return [
        row.method,
        f"{row.hits:g}/{row.count}",
        f"{low:.2f}-{high:.2f}",
        f"{row.same}/{row.count}",
        f"{row.bytes_per_token:,.0f}",
        f"{row.of_full:.3f}",
        f"{row.milliseconds:.0f}",
    ]


def head(task: str) -> list[str]:
    if task == "text":
        return ["method", "perplexity", "KL", "agree", "B/token", "of full"]
    return ["method", "found", "95 %", "same", "B/token", "of full", "ms"]


def table(outcomes: Sequence[Outcome], task: str) -> Table:
    """For the terminal."""
    out = Table(title=f"{task}", title_justify="left")
    for name in head(task):
        out.add_column(name, justify="left" if name == "method" else "right")
    before = None
    for row in rows(outcomes, task):
        if before not in (None, row.family):
            out.add_section()
        before = row.family
        out.add_row(*cells(row, task))
    return out


def markdown(outcomes: Sequence[Outcome], tasks: Sequence[str], title: str) -> str:
    """The same for a document."""
    lines = [f"# {title}", ""]
    for task in tasks:
        names = head(task)
        lines += [f"## {task}", "", f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
        lines += [f"| {' | '.join(cells(row, task))} |" for row in rows(outcomes, task)]
        lines.append("")
    return "\n".join(lines)


MARKS = {"pikv": ("o", "tab:blue"), "kvpress": ("x", "tab:orange"), "transformers": ("s", "tab:gray")}


def plot(path: Path, outcomes: Sequence[Outcome], tasks: Sequence[str], title: str) -> None:
    """Quality against bytes, one panel per task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(tasks), figsize=(9 * len(tasks), 6.5), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        labelled: list[tuple[float, float]] = []
        for family, (mark, colour) in MARKS.items():
            points = [r for r in rows(outcomes, task) if r.family == family]
            ys = [_quality(r) for r in points]
            axis.scatter([r.of_full for r in points], ys, marker=mark, color=colour, label=family, s=40, zorder=3)
            for row, y in zip(points, ys, strict=True):
                near = sum(abs(math.log(row.of_full / x)) < 0.12 and abs(y - v) < 0.035 for x, v in labelled)
                labelled.append((row.of_full, y))
                name = row.method.replace(" off", "")
                axis.annotate(name, (row.of_full, y), (5, 4 - 9 * near), textcoords="offset points", fontsize=7)
        axis.set_xscale("log", base=2)
        axis.set_xticks([1 / 16, 1 / 8, 1 / 4, 1 / 2, 1], ["1/16", "1/8", "1/4", "1/2", "1"])
        axis.set_xlabel("allocated bytes, of the full cache's")
        axis.set_ylabel("agreement with the full cache" if task == "text" else "answers found")
        axis.set_title(task)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _quality(row: Row) -> float:
    value: Any = row.agreement if row.share is None else row.share
    return float(value)
