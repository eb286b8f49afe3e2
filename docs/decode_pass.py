"""Draws docs/decode-pass.png: one layer of a decode pass on two ranks. Run it from the project's folder."""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

OP, WIRE, STATE = "#dbe9f6", "#fde2c4", "#e6f2df"
STEPS = [
    (7.4, "append_tokens\nnew keys and values into the tails; NaN noted", OP),
    (6.2, "tail_attention\nover the own open tails, while queries travel", OP),
    (5.0, "decode_attention\nall ranks' queries over this rank's pages", OP),
    (2.9, "merge_partials\nrank 0, rank 1, tail last; into the model's type", OP),
    (1.7, "the layer's experts run", "#f2f2f2"),
    (0.5, "append_experts\nwhat the new tokens chose, into the tails", OP),
]


def box(axes: Axes, x: float, y: float, width: float, text: str, colour: str, height: float = 0.85) -> None:
    style = "round,pad=0.02,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor="#555555"))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8.5)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#555555", "shrinkA": 0, "shrinkB": 0})


def main() -> None:
    figure, axes = plt.subplots(figsize=(10, 7.2))
    box(axes, 0.2, 8.75, 9.6, "step plan, once per pass: rows, widths, errors, how the last pass has ended", WIRE, 0.6)
    for rank, x in enumerate((0.2, 6.0)):
        axes.text(x + 1.9, 8.45, f"rank {rank}", ha="center", fontsize=10, weight="bold")
        for y, text, colour in STEPS:
            box(axes, x, y, 3.8, text, colour)
        for (above, *_), (below, *_) in itertools.pairwise(STEPS):
            if (above, below) != (5.0, 2.9):
                arrow(axes, (x + 1.9, above), (x + 1.9, below + 0.87))
    box(axes, 4.25, 5.75, 1.5, "all-gather\nof queries", WIRE, 1.0)
    box(axes, 0.2, 3.95, 9.6, "all-to-all of partials: outputs and log-sum-exps, equally many to each rank", WIRE, 0.6)
    for x in (2.1, 7.9):
        arrow(axes, (x, 5.0), (x, 4.57))
        arrow(axes, (x, 3.95), (x, 3.77))
    for side in (4.02, 5.98):
        inner = 4.25 if side < 5 else 5.75
        arrow(axes, (side, 7.6), (inner, 6.6))
        arrow(axes, (inner, 5.9), (side, 5.5))
    box(axes, 4.25, 0.5, 1.5, "full pages of\nall layers:\nsealed together\nafter the last", STATE, 1.15)
    axes.set_xlim(0, 10)
    axes.set_ylim(0.3, 9.5)
    axes.axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(Path("docs/decode-pass.png"), dpi=110)


if __name__ == "__main__":
    main()
