"""The command `pikv trace`: what the traces of a run tell, as a table and as pictures."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from pikv_ds.core.reuse import DISTANCES, WINDOW
from pikv_ds.core.trace import RankTrace, read
from pikv_ds.tools import tables
from pikv_ds.tools.command_line import check_folders, picture

EXAMPLES = """examples:
  deepspeed … --config CONFIG       with "pikv": {"trace": "traces"} in it: each rank writes traces/trace-rankN.jsonl
  pikv trace show traces            pages stored, freed and why, per rank
  pikv trace plot traces            traces/trace.png: occupancy per rank, reuse distances, homes per layer and expert
  pikv trace plot traces --out run7.png"""
MANY_RANKS = 16
"""From so many ranks on, occupancy is drawn as their range and mean."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to `pikv`."""
    parser = commands.add_parser(
        "trace",
        help="what a run's page events tell, as a table or a picture",
        description='Reads the traces that a cache with "trace": "FOLDER" in its settings has written.',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_subparsers(dest="what", required=True, metavar="show|plot")
    for name, text in (("show", "a table per rank"), ("plot", "draws a PNG")):
        sub = what.add_parser(
            name, help=text, description=text, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.add_argument("folder", type=Path, help="with trace-rankN.jsonl of all ranks")
        if name == "plot":
            sub.add_argument("--out", type=picture, metavar="FILE", help="default: FOLDER/trace.png")
        sub.set_defaults(run=_show if name == "show" else _plot)


def _show(args: argparse.Namespace) -> int:
    traces = read(args.folder)
    tables.show(table(traces))
    for line in notes(traces):
        print(line)
    return 0


def _plot(args: argparse.Namespace) -> int:
    out = args.out or args.folder / "trace.png"
    check_folders(out)
    traces = read(args.folder)
    plot(out, traces, str(args.folder))
    for line in notes(traces):
        print(line)
    print(f"wrote {out}")
    return 0


def table(traces: Sequence[RankTrace]) -> Table:
    """One line per rank, and the sum."""
    out = Table(title=_title(traces), title_justify="left")
    reasons = sorted({why for trace in traces for why in trace.freed})
    heads = ["rank", "passes", "sealed", "stored", *reasons, "left", "most", "visits", f"within {WINDOW}"]
    for head in heads:
        out.add_column(head, justify="right")
    for trace in traces:
        out.add_row(str(trace.rank), f"{len(trace.pages):,}", *_cells([trace], reasons))
    if len(traces) > 1:
        out.add_section()
        out.add_row("all", "", *_cells(traces, reasons))
    return out


def _cells(traces: Sequence[RankTrace], reasons: list[str]) -> list[str]:
    stored = sum(sum(t.stored.values()) for t in traces)
    freed: Counter[str] = sum((t.freed for t in traces), Counter())
    distances: Counter[int] = sum((t.distances for t in traces), Counter())
    again = sum(distances.values())
    soon = sum(n for d, n in distances.items() if d <= WINDOW)
    most = max((max(t.pages, default=0) for t in traces), default=0)
    return [
        f"{sum(len(t.seals) for t in traces):,}",
        f"{stored:,}",
        *(f"{freed[why]:,}" for why in reasons),
        f"{stored - sum(freed.values()):,}",
        f"{most:,}",
        f"{sum(t.visits for t in traces):,}",
        f"{soon / again:.0%}" if again else "-",
    ]


def notes(traces: Sequence[RankTrace]) -> list[str]:
    """What a reader should know beside the figures."""
    out = []
    if not any(t.visits for t in traces):
        out.append(f'no visits: the lookup "{traces[0].facts["lookup"]}" reads every page in each pass')
    if cut := [str(t.rank) for t in traces if t.cut_off]:
        out.append(f"the last line of rank {', '.join(cut)} is not whole: killed?")
    return out


def _title(traces: Sequence[RankTrace]) -> str:
    facts = traces[0].facts
    codecs = ", ".join(dict.fromkeys(c["codec"] for c in facts["codecs"]))
    return (
        f"{facts['ranks']} ranks, {facts['layers']} layers, {facts['experts']} experts, pages of {facts['page_size']} "
        f"tokens ({codecs}), placement {facts['placement']}, lookup {facts['lookup']}"
    )


def homes(traces: Sequence[RankTrace]) -> list[list[int]]:
    """Pages by layer and home expert, ``[layers][experts]``."""
    facts = traces[0].facts
    out = [[0] * facts["experts"] for _ in range(facts["layers"])]
    for trace in traces:
        for seal in trace.seals:
            if seal.home >= 0:
                out[seal.layer][seal.home] += 1
    return out


def plot(path: Path, traces: Sequence[RankTrace], name: str) -> None:
    """Occupancy per rank over time, reuse distances, and how many pages each expert is home to at each layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplot_mosaic(
        [["pages", "pages"], ["reuse", "homes"]], figsize=(12, 8.5), layout="constrained"
    )
    _occupancy(axes["pages"], traces)
    _reuse(axes["reuse"], traces)
    _homes(figure, axes["homes"], traces)
    figure.suptitle(f"{name}: {_title(traces)}", fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _occupancy(axes: Any, traces: Sequence[RankTrace]) -> None:
    if len(traces) <= MANY_RANKS:
        for trace in traces:
            axes.step(trace.seconds, trace.pages, where="post", label=f"rank {trace.rank}", lw=1.2)
    else:
        passes = min(len(t.pages) for t in traces)
        columns = [[t.pages[i] for t in traces] for i in range(passes)]
        seconds = traces[0].seconds[:passes]
        axes.fill_between(seconds, list(map(min, columns)), list(map(max, columns)), alpha=0.3, label="all ranks")
        axes.plot(seconds, [sum(c) / len(c) for c in columns], label="mean")
    capacity = traces[0].facts["capacity_pages"]
    if capacity is not None:
        axes.axhline(capacity, color="black", ls=":", label="capacity")
    axes.set(xlabel="seconds", ylabel="pages in the pool", title="Occupancy per rank", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)


def _reuse(axes: Any, traces: Sequence[RankTrace]) -> None:
    axes.set(title="Reuse distances of sparse lookups")
    distances: Counter[int] = sum((t.distances for t in traces), Counter())
    total = sum(distances.values())
    if not total:
        axes.text(0.5, 0.5, "no visits:\nevery page is read in each pass", ha="center", va="center")
        axes.set_axis_off()
        return
    buckets = [0] * DISTANCES
    for distance, count in distances.items():
        buckets[min(distance.bit_length() - 1, DISTANCES - 1)] += count
    last = max(i for i, n in enumerate(buckets) if n)
    labels = [str(2**i) if i == 0 else f"{2**i}-{2 ** (i + 1) - 1}" for i in range(last + 1)]
    axes.bar(labels, [100 * n / total for n in buckets[: last + 1]])
    axes.set(xlabel="passes since the page's last visit", ylabel="% of visits but the first")
    axes.tick_params(axis="x", rotation=45)
    axes.grid(alpha=0.3, axis="y")


def _homes(figure: Any, axes: Any, traces: Sequence[RankTrace]) -> None:
    counts = homes(traces)
    axes.set(title="Pages by home expert", xlabel="expert", ylabel="layer")
    if not any(map(any, counts)):
        axes.text(0.5, 0.5, "no pages with a home expert", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    image = axes.imshow(counts, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0)
    figure.colorbar(image, ax=axes, label="pages")
    facts = traces[0].facts
    if facts["ranks"] <= MANY_RANKS:
        for rank in range(1, facts["ranks"]):
            axes.axvline(rank * facts["experts"] / facts["ranks"] - 0.5, color="white", lw=1)
