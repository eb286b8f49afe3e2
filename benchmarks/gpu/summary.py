"""What a folder holds, as Markdown and as a picture: each time beside its floor, the bytes over a copy's bandwidth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import Record, Results
from benchmarks.gpu.sizes import FULL


def best_copy(results: Results) -> float | None:
    """Bytes per second of the fastest plain copy, None where none was timed."""
    rows = [
        r for case in results.cases("bandwidth").values() for r in case.get("rows", []) if r["contender"] == "copy"
    ]
    return max((r["bytes"] / r["seconds"] for r in rows), default=None)


def markdown(results: Results, steps: Sequence[str]) -> str:
    """All of it, in the order of the steps."""
    head = dict.fromkeys(_head(results))  # calls on one machine say the same of it
    return "\n".join([*head, *_steps(results, steps), *(x for name in steps for x in _cases(results, name))])


def _head(results: Results) -> Iterator[str]:
    calls, machines = results.records("call"), results.records("machine")
    names = dict.fromkeys(m["name"] for m in machines) or {"no machine": None}
    yield f"# {'; '.join(names)}\n"
    if calls and calls[-1]["dry_run"]:
        yield "**A dry run on a CPU: no figure here means anything.**\n"
    for call in calls:
        yield f"- call {call['number']}: {call['date']}, sources {call['sources'][:12]}"
    for machine in machines:
        owners = sorted(set(machine["ops"].values()))
        by_owner = (f"{owner}: {', '.join(op for op, o in machine['ops'].items() if o == owner)}" for owner in owners)
        yield f"- ops of {'; '.join(by_owner)}"
        if "extension" in machine:
            yield "- extension: " + "; ".join(f"{key} {value}" for key, value in machine["extension"].items())
    if (rate := best_copy(results)) is not None:
        yield f"- a copy moves {rate / 1e9:,.1f} GB/s, read and written: floors are bytes over this"
    yield "- clocks: graph (a CUDA graph replayed), events (around calls that make the host wait), host"
    size = FULL.working_set >> 20
    yield f"- on a GPU every contender with a floor walks through at least {size} MiB, which no cache holds"


def _steps(results: Results, steps: Sequence[str]) -> Iterator[str]:
    yield "\n| step | state | seconds | cases | failed | why |\n|---|---|---|---|---|---|"
    for name in steps:
        step = results.steps().get(name, {"state": "not begun"})
        failures, cases = len(results.failures(name)), len(results.cases(name))
        seconds, reason = step.get("seconds", ""), step.get("reason", "").replace("|", "\\|")[:300]
        yield f"| {name} | {step['state']} | {seconds} | {cases} | {failures} | {reason} |"


def _cases(results: Results, step: str) -> Iterator[str]:
    cases = results.cases(step)
    if not cases:
        return
    yield f"\n## {step}\n"
    if failures := results.failures(step):
        yield "\n".join(f"- **failed** {failure}" for failure in failures) + "\n"
    timed = {name: case["rows"] for name, case in cases.items() if "rows" in case}
    judged = [case for case in cases.values() if "errors" in case]
    counted = [case["counts"] for case in cases.values() if "counts" in case]
    if timed and step.startswith("decode"):
        yield from _decode_times(timed, best_copy(results))
    elif timed:
        yield from _times(timed, best_copy(results))
    elif judged:
        shares = [
            e / l for case in judged if case["ok"] for e, l in zip(case["errors"], case["limits"], strict=True) if l
        ]
        right, most = sum(case["ok"] for case in judged), max(shares, default=0.0)
        yield f"{right} of {len(judged)} right; the largest error of these is {most:.2f} of its limit"
    elif counted:
        totals = {what: sum(x.get(what, 0) for x in counted) for what in ("passed", "failed", "error", "skipped")}
        yield ", ".join(f"{n} {what}" for what, n in totals.items())
    else:
        for name, case in cases.items():
            yield f"- {name}: " + ", ".join(f"{k} {_short(v)}" for k, v in case.items() if k not in _ABOUT)


_ABOUT = {"kind", "step", "case", "call", "ok", "wrong", "error"}


def _decode_times(timed: dict[str, list[Record]], rate: float | None) -> Iterator[str]:
    """A line per case: the whole, its two kernels, the floor, and torch's attention over as many tokens."""
    yield "| case | µs | quartiles | pages µs | merge µs | floor µs | floor / time | SDPA µs | time / SDPA | clock |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for name, rows in timed.items():
        whole, others = rows[0], {r["contender"].split()[0]: r["seconds"] for r in rows[1:]}
        sdpa = others.get("torch")
        cells = [
            name,
            _us(whole["seconds"]),
            f"± {whole['quartiles'] / 2:.0%}",
            _us(others.get("of")),
            _us(others.get("merge")),
            _us(whole["bytes"] / rate if rate else None),
            f"{whole['bytes'] / rate / whole['seconds']:.2f}" if rate else "",
            _us(sdpa),
            f"{whole['seconds'] / sdpa:.2f}" if sdpa else "",
            whole["clock"],
        ]
        yield "| " + " | ".join(cells) + " |"


def _times(timed: dict[str, list[Record]], rate: float | None) -> Iterator[str]:
    """A line per contender, its time also as a share of the first one's."""
    yield "| case | contender | µs | quartiles | GB/s | floor µs | floor / time | time / first | clock |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, rows in timed.items():
        for r in rows:
            floor = r["bytes"] / rate if rate and r["bytes"] else None
            cells = [
                name,
                r["contender"],
                _us(r["seconds"]),
                f"± {r['quartiles'] / 2:.0%}",
                f"{r['bytes'] / r['seconds'] / 1e9:,.1f}" if r["bytes"] else "",
                _us(floor),
                f"{floor / r['seconds']:.2f}" if floor else "",
                f"{r['seconds'] / rows[0]['seconds']:.2f}",
                r["clock"],
            ]
            yield "| " + " | ".join(cells) + " |"


def _us(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:,.1f}"


def _short(value: Any) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else str(value)


def plot(results: Results, path: Path) -> None:
    """Of decoding: time as a multiple of the floor, per codec over the shapes, and torch's attention among them.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rate, cases = best_copy(results), results.cases("decode")
    timed = {name: case["rows"] for name, case in cases.items() if "rows" in case}
    if rate is None or not timed:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(name.split(" ", 1)[1] for name in timed))
    series: dict[str, dict[str, Record]] = {}
    for name, rows in timed.items():
        for row in rows:
            if row["contender"].startswith(("pikv", "torch")):
                series.setdefault(row["contender"], {}).setdefault(name.split(" ", 1)[1], row)
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5.5), constrained_layout=True, sharex=True)
    for contender, rows in series.items():
        places = [i for i, shape in enumerate(shapes) if shape in rows]
        seconds = [rows[shapes[i]]["seconds"] for i in places]
        floors = [rows[shapes[i]]["bytes"] / rate for i in places]
        marker = "o" if contender.startswith("pikv") else "x"
        axes[0].plot(places, [s * 1e6 for s in seconds], marker, label=contender)
        axes[1].plot(places, [f / s for f, s in zip(floors, seconds, strict=True)], marker)
    axes[0].set(yscale="log", ylabel="µs per layer and step")
    axes[1].set(ylabel="floor / time (1: as fast as a copy)", ylim=(0, None))
    for axis in axes:
        axis.set_xticks(range(len(shapes)), shapes, rotation=60, ha="right", fontsize=7)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle("; ".join(dict.fromkeys(m["name"] for m in results.records("machine"))), fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write(results: Results, steps: Sequence[str]) -> None:
    """Writes summary.md, and decode.png where matplotlib is installed."""
    (results.folder / "summary.md").write_text(markdown(results, steps) + "\n")
    try:
        plot(results, results.folder / "decode.png")
    except ImportError as error:
        print(f"no picture: {error}")
