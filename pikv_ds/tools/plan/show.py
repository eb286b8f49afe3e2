"""`pikv plan`'s tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from pikv_ds.tools.plan.costs import Costs
from pikv_ds.tools.plan.planner import DP
from pikv_ds.tools.plan.simulate import Point


def plan_table(title: str, rows: Sequence[Mapping[str, Any]], with_steps: bool) -> Table:
    """One line for each way to keep the KV."""
    out = Table(title=title, title_justify="left")
    fitting = {"longest_context": "longest context", "largest_batch": "largest batch", "longest_alone": "one sequence"}
    shown = [text for key, text in fitting.items() if key in rows[0]]
    heads = ["KV cache", "GiB per rank", "most", "of DP", "wire per step", *["step"] * with_steps, *shown]
    for head in heads:
        out.add_column(head, justify="left" if head == "KV cache" else "right")
    for row in rows:
        cells = [row["name"], gib(row["total"]), gib(row["most"]), f"{row['share']:.3f}", size(row["wire"])]
        if with_steps:
            cells.append("-" if row["step_s"] is None else f"{row['step_s'] * 1e3:,.1f} ms")
        out.add_row(*cells, *(f"{row[key]:,}" for key in fitting if key in row))
    return out


def costs_table(title: str, costs: Costs) -> Table:
    """What was fitted."""
    out = Table(title=f"costs: {title}", title_justify="left", show_header=False)
    out.add_column()
    out.add_column(justify="right")
    out.add_row("a collective (alpha)", f"{costs.alpha * 1e6:,.0f} us")
    out.add_row("the network (1 / beta)", f"{1e-9 / costs.beta:.2f} GB/s" if costs.beta else "-")
    for name, text in (("step", "a pass"), ("layer", "a layer of it"), ("row", "a query at a layer")):
        out.add_row(text, f"{getattr(costs, name) * 1e6:,.0f} us")
    for codec, per_byte in costs.byte.items():
        out.add_row(f"reading {codec} pages", f"{1e-9 / per_byte:.2f} GB/s" if per_byte else "-")
    return out


def points_table(title: str, points: Sequence[Mapping[str, Any]]) -> Table:
    """Predicted and measured passes; of the fitted loads only the worst error."""
    fitted = [abs(p["predicted_s"] / p["measured_s"] - 1) for p in points if not p["held_out"]]
    out = Table(
        title=f"predicted and measured decode passes: {title}", title_justify="left", caption_justify="left",
        caption=f"loads that were not fitted; over the {len(fitted)} fitted ones at most {max(fitted):.1%} off, "
        f"{sorted(fitted)[len(fitted) // 2]:.1%} in the middle",
    )  # fmt: skip
    for head in ("codec", "layers", "sequences per rank", "tokens", "predicted", "measured", "off"):
        out.add_column(head, justify="left" if head == "codec" else "right")
    for p in points:
        if p["held_out"]:
            off = p["predicted_s"] / p["measured_s"] - 1
            seconds = (f"{p[key] * 1e3:.1f} ms" for key in ("predicted_s", "measured_s"))
            out.add_row(p["codec"], str(p["layers"]), str(p["batch"]), f"{p['context']:,}", *seconds, f"{off:+.1%}")
    return out


def simulation_table(title: str, points: Sequence[Point]) -> Table:
    """One line for each way and number of ranks."""
    out = Table(title=title, title_justify="left")
    for head in ("ranks", "EP group", "KV cache", "step", "over DP", "fullest rank", "skew", "to other nodes"):
        out.add_column(head, justify="left" if head == "KV cache" else "right")
    for before, p in zip([None, *points], points, strict=False):
        if before is not None and before.ranks != p.ranks:
            out.add_section()
        dp = next(x.step_s for x in points if x.ranks == p.ranks and x.way == DP)
        out.add_row(
            f"{p.ranks:,}", str(p.group), p.way, f"{p.step_s * 1e3:,.2f} ms", f"{p.step_s / dp:.2f}",
            f"{gib(p.fullest)} GiB", f"{p.skew:.2f}", size(p.between_bytes),
        )  # fmt: skip
    return out


def _figure(rows: int, columns: int, height: float) -> tuple[Any, Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(6 * columns, height), layout="constrained", squeeze=False)
    return pyplot, figure, axes


def plot_memory(path: Path, title: str, curves: Mapping[str, Sequence[tuple[int, float]]], ours: set[str]) -> None:
    """GiB of KV per rank against the context, for each way."""
    pyplot, figure, ((axes,),) = _figure(1, 1, 5)
    dashes = iter(("--", ":", "-."))  # on top: some of them lie on each other, and on PiKV's without a codec
    for name, points in sorted(curves.items(), key=lambda curve: curve[0] not in ours):
        style = {"marker": "o", "lw": 3, "alpha": 0.6} if name in ours else {"color": "black", "ls": next(dashes)}
        axes.plot(*zip(*points, strict=True), label=name, **style)
    contexts = [context for context, _ in next(iter(curves.values()))]
    axes.set(xscale="log", yscale="log", xlabel="tokens per sequence", ylabel="GiB of KV per rank", title=title)
    axes.set_xticks(contexts, [f"{c // 1024}k" if c >= 1024 else str(c) for c in contexts], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def plot_points(path: Path, title: str, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Predicted against measured passes, a panel for each number of ranks."""
    pyplot, figure, axes = _figure(1, len(results), 5.5)
    for axis, (key, points) in zip(axes[0], results.items(), strict=True):
        for codec in dict.fromkeys(p["codec"] for p in points):
            for held_out, marker in ((False, "x"), (True, "o")):
                mine = [p for p in points if p["codec"] == codec and p["held_out"] == held_out]
                xs, ys = ([p[name] * 1e3 for p in mine] for name in ("measured_s", "predicted_s"))
                number = list(dict.fromkeys(p["codec"] for p in points)).index(codec)
                label = f"{codec}, {'not fitted' if held_out else 'fitted'}"
                axis.plot(xs, ys, ls="", marker=marker, color=f"C{number}", label=label)
        ends = [f(p["measured_s"] for p in points) * 1e3 for f in (min, max)]
        for factor, style in ((1.0, "-"), (0.9, ":"), (1.1, ":")):
            axis.plot(ends, [factor * x for x in ends], color="black", ls=style, lw=0.8)
        axis.set(xscale="log", yscale="log", xlabel="measured, ms per pass", ylabel="predicted, ms")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter("{x:g}")
            side.set_minor_formatter("{x:g}")
        axis.set_title(key, fontsize=9)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    figure.suptitle(f"{title} (dotted: 10 % off)", fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_simulation(path: Path, title: str, points: Sequence[Point]) -> None:
    """Step time, memory, skew and traffic against the number of ranks."""
    pyplot, figure, axes = _figure(2, 2, 9)
    ways = list(dict.fromkeys(p.way for p in points))
    panels = (
        ("step_s", 1e3, "attention of a decode pass, ms", True),
        ("fullest", 2**-30, "GiB of KV on the fullest rank", True),
        ("skew", 1.0, "fullest rank over the mean, per layer", False),
        ("between_bytes", 2**-20, "MiB to other nodes per rank and pass", False),
    )
    for axis, (name, scale, text, log) in zip(axes.flatten(), panels, strict=True):
        for number, way in enumerate(ways):
            mine = [p for p in points if p.way == way]
            colour = "black" if way in (DP, "p mod c") else f"C{number}"
            line = {DP: "--", "p mod c": ":"}.get(way, "-")
            marker = "s" if way.endswith("eplb") else "^" if way.endswith("node") else "o"
            xs, ys = [p.ranks for p in mine], [getattr(p, name) * scale for p in mine]
            axis.plot(xs, ys, label=way, color=colour, ls=line, marker=marker, ms=4)
        ticks = sorted({p.ranks for p in points})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.set_yscale("log" if log else "linear")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.set(xlabel="ranks", ylabel=text)
        axis.grid(alpha=0.3, which="both")
    group = max(p.group for p in points)
    if group < max(p.ranks for p in points):
        for axis in axes.flatten():
            axis.axvline(group, color="grey", lw=0.8)
        axes[1, 1].annotate(f"more ranks: several\ngroups of {group}", (group, sum(axes[1, 1].get_ylim()) / 2),
                            fontsize=8, xytext=(4, 4), textcoords="offset points")  # fmt: skip
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def gib(num_bytes: float) -> str:
    """In GiB, without the unit."""
    return f"{num_bytes / 2**30:,.2f}"


def size(num_bytes: float) -> str:
    """With the unit that fits."""
    for unit, unit_bytes in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= unit_bytes:
            return f"{num_bytes / unit_bytes:,.1f} {unit}"
    return f"{num_bytes:,.0f} B" if num_bytes else "0"
