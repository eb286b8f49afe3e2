"""The controller: measures settings on a calibration text and keeps the one with the least objective.

The objective is PiKV's ``E[latency] + l1 * memory - l2 * fidelity``, an expression of three figures, each relative to
the uncompressed, exact cache on the same cases: *latency* (decode time per token), *memory* (allocated bytes) and
*fidelity* (share of a text's best guesses that stay the same).
"""

from __future__ import annotations

import ast
import json
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pikv_ds import checks
from pikv_ds.errors import UsageError
from pikv_ds.tools.eval.run import Outcome

FIGURES = ("latency", "memory", "fidelity")
MOST_TEXT = 500
"""Characters of an objective, so that its tree is not too deep to walk."""


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
        remedy = f"--objective {checks.shown(text)}: write sums and products of {', '.join(FIGURES)} and numbers"
        if len(text) > MOST_TEXT:
            raise UsageError(f"{remedy}, of at most {MOST_TEXT} characters")
        try:
            tree = ast.parse(text, mode="eval")
        except (SyntaxError, ValueError) as error:  # ValueError: a NUL
            raise UsageError(f"{remedy} ({getattr(error, 'msg', error)})") from None
        for node in ast.walk(tree):
            if not isinstance(node, self.ALLOWED):
                raise UsageError(f"{remedy}, no {type(node).__name__}")
            if isinstance(node, ast.Name) and node.id not in FIGURES:
                raise UsageError(f"{remedy}, no {node.id!r}")
            if isinstance(node, ast.Constant) and type(node.value) not in (int, float):
                raise UsageError(f"{remedy}, no {node.value!r}")
            if isinstance(node, ast.Constant) and not abs(node.value) < 1e300:  # type: ignore[arg-type]
                raise UsageError(f"{remedy}, no number as large as {checks.shown(node.value)}")
        if not any(isinstance(node, ast.Name) for node in ast.walk(tree)):
            raise UsageError(f"{remedy}; it names none of the figures")
        self._tree = tree.body
        if not math.isfinite(self.of(Point("", {}, *TRIED))):
            raise UsageError(f"{remedy}; it has no value at {dict(zip(FIGURES, TRIED, strict=False))}")

    def of(self, point: Point) -> float:
        """Its value at a point; the least is the best. Infinite where it has none, as one divided by zero."""
        try:
            value = _value(self._tree, point)
        except (ArithmeticError, ValueError):
            return math.inf
        return math.inf if math.isnan(value) else value


TRIED = 0.9, 0.5, 0.95, 1.0
"""Figures of a usual setting, at which an objective must have a value before anything is measured."""
OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: math.pow,
}  # fmt: skip


def _value(node: ast.AST, point: Point) -> float:
    """In floating point at every step: powers of whole numbers have no bound."""
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](_value(node.left, point), _value(node.right, point))
    if isinstance(node, ast.UnaryOp):
        value = _value(node.operand, point)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Name):
        return float(getattr(point, node.id))
    assert isinstance(node, ast.Constant)
    return float(node.value)  # type: ignore[arg-type]


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
