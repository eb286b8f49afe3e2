"""Results as a table, as JSON and as a picture."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from pikv_ds.tools.bench.timing import Timing


def machine(device: torch.device) -> str:
    """What it was measured on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names) or 1} cores, torch {torch.__version__}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def table(title: str, timings: Sequence[Timing], baseline: str, rate: bool = False) -> Table:
    """One line per contender, with its time as a ratio of the baseline's in the same group.

    Args:
        rate: compare bytes per second instead, where contenders move different amounts.
    """
    out = Table(title=title, title_justify="left")
    for name in ("context", "threads", "contender"):
        out.add_column(name, justify="left" if name == "contender" else "right")
    for name in ("median", "quartiles", "GB/s", f"{'GB/s' if rate else 'time'} / {baseline}"):
        out.add_column(name, justify="right")
    ordered = sorted(timings, key=lambda t: (_number(t.group), t.threads))
    for before, t in zip([None, *ordered], ordered, strict=False):
        if before is not None and (before.group, before.threads) != (t.group, t.threads):
            out.add_section()
        ratio = _ratio(t, timings, baseline, rate)
        out.add_row(
            t.group,
            str(t.threads),
            t.name,
            f"{t.seconds * 1e3:.3f} ms",
            f"± {t.spread / 2:.0%}",
            f"{t.gb_per_s:.1f}",
            "" if ratio is None else f"{ratio:.2f}",
        )
    return out


def rows(timings: Sequence[Timing], baseline: str, rate: bool = False) -> list[dict[str, Any]]:
    """The same as plain values."""
    return [
        {
            "contender": t.name,
            "context": t.group,
            "threads": t.threads,
            "median_s": t.seconds,
            "quartiles_share": t.spread,
            "bytes": t.num_bytes,
            "gb_per_s": t.gb_per_s,
            "clock": t.clock,
            "ratio": _ratio(t, timings, baseline, rate),
        }
        for t in timings
    ]


def plot(path: Path, title: str, timings: Sequence[Timing]) -> None:
    """Time and GB/s against context, as a PNG (or whatever the file's ending says)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time_axis, rate_axis) = pyplot.subplots(1, 2, figsize=(12, 5.5), constrained_layout=True)
    colours = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
    names = list(dict.fromkeys((t.name, t.threads) for t in timings))
    several = len({t.threads for t in timings}) > 1
    for number, (name, threads) in enumerate(names):
        points = sorted((_number(t.group), t) for t in timings if (t.name, t.threads) == (name, threads))
        xs = [x for x, _ in points]
        style = {
            "color": colours[number % len(colours)],
            "marker": "o" if name.startswith("pikv") else "x",
            "linestyle": "-" if threads == 1 else "--",
        }
        label = f"{name}, {threads} threads" if several else name
        time_axis.plot(xs, [t.seconds * 1e3 for _, t in points], label=label, **style)
        rate_axis.plot(xs, [t.gb_per_s for _, t in points], label=label, **style)
    for axis, label in ((time_axis, "ms per layer and step"), (rate_axis, "GB/s read (copy: and written)")):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:g}k")
        axis.set_xlabel("context (tokens)")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    time_axis.set_yscale("log")
    figure.legend(*time_axis.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _number(group: str) -> float:
    try:
        return float(group.removesuffix("k")) * (1024 if group.endswith("k") else 1)
    except ValueError:
        return 0.0


def _ratio(t: Timing, timings: Sequence[Timing], baseline: str, rate: bool) -> float | None:
    base = [b for b in timings if (b.name, b.group, b.threads) == (baseline, t.group, t.threads)]
    if not base:
        return None
    return t.gb_per_s / base[0].gb_per_s if rate else t.seconds / base[0].seconds
