"""Counts, tables and pictures of `pikv eval`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from pikv_ds.tools.eval.methods import Full
from pikv_ds.tools.eval.run import Outcome


def wilson(hits: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927)."""
    if count == 0:
        return 0.0, 1.0
    z = 1.959964
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
    lost: int
    """Cases in which the full cache does better."""
    gained: int
    """Cases in which it does worse."""
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
    full: dict[str, float] = {}
    for o in outcomes:
        if o.task == task:
            by_method.setdefault(o.method, []).append(o)
            if o.method == Full.name and o.score is not None:
                full[o.case] = o.score
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
                sum(o.score is not None and o.score < full.get(o.case, -1.0) for o in group),
                sum(o.score is not None and o.score > full.get(o.case, 2.0) for o in group),
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
        f"{row.hits:.3g}/{row.count}",
        f"{low:.2f}-{high:.2f}",
        f"{row.lost} / {row.gained}",
        f"{row.same}/{row.count}",
        f"{row.bytes_per_token:,.0f}",
        f"{row.of_full:.3f}",
        f"{row.milliseconds:.0f}",
    ]


def head(task: str) -> list[str]:
    if task == "text":
        return ["method", "perplexity", "KL", "agree", "B/token", "of full"]
    return ["method", "found", "95 %", "lost/gained", "same", "B/token", "of full", "ms"]


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
    """Quality against bytes, one panel per task; methods by number, with their names beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    numbers = {name: i + 1 for i, name in enumerate(dict.fromkeys(o.method for o in outcomes))}
    family_of = {o.method: o.family for o in outcomes}
    height = max(6.0, 0.17 * len(numbers) + 1)
    figure, axes = pyplot.subplots(1, len(tasks) + 1, figsize=(7 * len(tasks) + 3, height), squeeze=False,
                                   width_ratios=[7] * len(tasks) + [3])  # fmt: skip
    for axis, task in zip(axes[0], tasks, strict=False):
        points = [(r, r.of_full, _quality(r)) for r in rows(outcomes, task)]
        for family, (mark, colour) in MARKS.items():
            mine = [(x, y) for r, x, y in points if r.family == family]
            axis.scatter([x for x, _ in mine], [y for _, y in mine], marker=mark, color=colour, label=family, s=36)
        for x, y, names in _clusters(points):
            text = " ".join(str(numbers[name]) for name in names)
            axis.annotate(text, (x, y), (0, 6), textcoords="offset points", fontsize=7, ha="center")
        axis.set_xscale("log", base=2)
        axis.set_xticks([1 / 16, 1 / 8, 1 / 4, 1 / 2, 1], ["1/16", "1/8", "1/4", "1/2", "1"])
        axis.set_xlabel("allocated bytes, of the full cache's")
        axis.set_ylabel("agreement with the full cache" if task == "text" else "answers found")
        axis.set_title(task)
        axis.grid(alpha=0.3)
        axis.legend(loc="best")
    names_axis = axes[0][-1]
    names_axis.axis("off")
    for name, number in numbers.items():
        colour, place = MARKS[family_of[name]][1], 1 - number / (len(numbers) + 1)
        names_axis.text(0, place, f"{number:2d}  {name}", color=colour, fontsize=8, va="center", family="monospace")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _clusters(points: Sequence[tuple[Row, float, float]]) -> list[tuple[float, float, list[str]]]:
    """Points that lie on each other, to be labelled together: ``(x, y, methods)``."""
    out: list[tuple[float, float, list[str]]] = []
    for row, x, y in sorted(points, key=lambda p: (p[2], p[1])):
        if out and abs(out[-1][1] - y) < 0.012 and abs(math.log(x / out[-1][0])) < 0.06:
            out[-1][2].append(row.method)
        else:
            out.append((x, y, [row.method]))
    return out


def _quality(row: Row) -> float:
    value: Any = row.agreement if row.share is None else row.share
    return float(value)
