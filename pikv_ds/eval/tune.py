"""The controller: measures settings on a calibration text and keeps the one with the least objective.

The objective is PiKV's ``E[latency] + l1 * memory - l2 * fidelity``, an expression of three figures, each relative to
the uncompressed, exact cache on the same cases: *latency* (decode time per token), *memory* (allocated bytes) and
*fidelity* (share of a text's best guesses that stay the same).
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pikv_ds.eval.run import Outcome

FIGURES = ("latency", "memory", "fidelity")


@dataclass(frozen=True)
class Point:
    """One setting and what it measured."""

    name: str
    config: dict[str, Any]
    latency: float
    memory: float
    fidelity: float
    needles: float
    """Share of the needles found, for information."""

    def beats(self, other: Point) -> bool:
        """Whether it is at least as good in every figure, and better in one."""
        mine, theirs = (-self.latency, -self.memory, self.fidelity), (-other.latency, -other.memory, other.fidelity)
        return all(a >= b for a, b in zip(mine, theirs, strict=True)) and mine != theirs


class Objective:
    """An expression such as ``latency + 0.2*memory - 5*fidelity``: sums, products and powers of figures and numbers.

    Raises:
        ValueError: anything else is in it.
    """

    ALLOWED = (
        ast.Expression, ast.BinOp, ast.UnaryOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.USub, ast.UAdd,
        ast.Constant, ast.Name, ast.Load,
    )  # fmt: skip

    def __init__(self, text: str) -> None:
        self.text = text
        remedy = f"--objective {text!r}: write sums and products of {', '.join(FIGURES)} and numbers"
        try:
            tree = ast.parse(text, mode="eval")
        except SyntaxError as error:
            raise ValueError(f"{remedy} ({error.msg})") from None
        for node in ast.walk(tree):
            if not isinstance(node, self.ALLOWED):
                raise ValueError(f"{remedy}, no {type(node).__name__}")
            if isinstance(node, ast.Name) and node.id not in FIGURES:
                raise ValueError(f"{remedy}, no {node.id!r}")
            if isinstance(node, ast.Constant) and not isinstance(node.value, (int, float)):
                raise ValueError(f"{remedy}, no {node.value!r}")
        if not any(isinstance(node, ast.Name) for node in ast.walk(tree)):
            raise ValueError(f"{remedy}; it names none of the figures")
        self._code = compile(tree, "objective", "eval")

    def of(self, point: Point) -> float:
        """Its value at a point; the least is the best."""
        figures = {name: getattr(point, name) for name in FIGURES}
        return float(eval(self._code, {"__builtins__": {}}, figures))  # checked above: arithmetic only


def points(outcomes: Sequence[Outcome], configs: dict[str, dict[str, Any]], baseline: str) -> list[Point]:
    """Figures of each setting from the outcomes of *text* and *needle* cases."""
    by_method: dict[str, list[Outcome]] = {}
    for o in outcomes:
        by_method.setdefault(o.method, []).append(o)
    plain = _seconds(by_method[baseline])
    out = []
    for name, config in configs.items():
        mine = by_method[name]
        agreements = [o.agreement for o in mine if o.agreement is not None]
        scores = [o.score for o in mine if o.score is not None]
        out.append(
            Point(
                name,
                config,
                _seconds(mine) / plain,
                sum(o.bytes_per_token for o in mine) / sum(o.full_bytes_per_token for o in mine),
                sum(agreements) / len(agreements),
                sum(scores) / len(scores),
            )
        )
    return out


def _seconds(outcomes: Sequence[Outcome]) -> float:
    """Median decode time per token."""
    times = sorted(o.seconds_per_token for o in outcomes if o.seconds_per_token > 0)
    return times[len(times) // 2]


def front(found: Sequence[Point]) -> list[Point]:
    """The Pareto front: points that no other beats, cheapest memory first."""
    return sorted((p for p in found if not any(q.beats(p) for q in found)), key=lambda p: (p.memory, p.latency))


def write(path: Path, base: dict[str, Any], best: Point, objective: Objective, facts: dict[str, Any]) -> None:
    """A configuration that reproduces the point, with the measured figures in it."""
    figures = {name: round(getattr(best, name), 4) for name in (*FIGURES, "needles")}
    tuned = {"objective": objective.text, "value": round(objective.of(best), 4), **figures, **facts}
    content = {**base, "pikv": best.config, "pikv_tuned": tuned}
    path.write_text(json.dumps(content, indent=2) + "\n")


def plot(path: Path, found: Sequence[Point], best: Point, title: str) -> None:
    """Fidelity against memory, latency as colour; the front is a line, the choice a star."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(10, 6.5))
    line = front(found)
    axis.plot([p.memory for p in line], [p.fidelity for p in line], color="lightgray", zorder=1)
    dots = axis.scatter([p.memory for p in found], [p.fidelity for p in found], c=[p.latency for p in found], zorder=2)
    axis.scatter([best.memory], [best.fidelity], marker="*", s=260, facecolor="none", edgecolor="red", zorder=3)
    for i, p in enumerate(line):
        axis.annotate(p.name, (p.memory, p.fidelity), (4, -10 if i % 2 else 6), textcoords="offset points", fontsize=7)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("memory, of the exact cache's")
    axis.set_ylabel("fidelity: best guesses that stay the same")
    figure.colorbar(dots, label="latency, of the exact cache's")
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
