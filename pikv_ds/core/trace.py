"""`PageTrace`: what happens to the pages of a rank, as JSON lines.

With ``"trace": "folder"`` in its settings a cache writes ``folder/trace-rankN.jsonl`` on each rank. The first line
says what the cache is, each other one what has happened (all have ``step``, the number of the pass):

========= ================================================================================================
``step``  a pass begins: pages in the pool and memory at its beginning, seconds since the trace's
``seal``  a page of this rank's own sequences has got its owner; with its home expert, and the votes for the first few
``store`` a page lies here now, in a slot
``free``  slots are empty again, and why: ``release``, ``evict``, ``demote``, ``move``
``visit`` a sparse lookup has chosen these slots at a layer (lookups of everything are not written)
========= ================================================================================================

``pikv trace`` turns a folder into a table and into pictures. A killed rank loses at most the last second.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pikv_ds import checks
from pikv_ds.errors import UsageError

Ints = NDArray[np.int64]

VERSION = 1
TOP_VOTES = 8
"""Experts of a page whose votes are written."""
FLUSH_S = 1.0
FACTS = {"rank", "ranks", "codecs"}
"""Of the cache, that a trace's first line must have."""


class PageTrace:
    """Writes the events of one rank.

    Args:
        folder: made where there is none; an older trace of the rank in it is replaced.
        facts: of the cache, for the first line.
        streams: KV heads of a layer with pages of their own (see `SequenceBatch`).

    Raises:
        ValueError: the file cannot be written.
    """

    def __init__(self, folder: str | Path, rank: int, facts: dict[str, Any], streams: int = 1) -> None:
        self.path = path_of(folder, rank)
        self._streams, self._step = streams, 0
        problem = obstacle(folder)
        if problem is not None:
            raise UsageError(f"pikv.trace = {str(folder)!r}: {problem}; name a folder that can be written")
        self._file: IO[str] = self.path.open("w")
        self._start = self._flushed = time.monotonic()
        self._write("start", version=VERSION, rank=rank, time=time.time(), streams=streams, **facts)

    def step(self, step: int, pages: int, kv_bytes: int, pool_bytes: int, own_tokens: int) -> None:
        """A pass begins."""
        self._step = step
        now = time.monotonic()
        seconds = round(now - self._start, 6)
        self._write("step", seconds=seconds, pages=pages, kv=kv_bytes, pool=pool_bytes, own_tokens=own_tokens)
        if now - self._flushed >= FLUSH_S:
            self._flushed = now
            self._file.flush()

    def seal(
        self, serials: Ints, units: Ints, numbers: Ints, owners: Ints, homes: Ints, votes: Mapping[int, Ints]
    ) -> None:
        """Pages of this rank's own sequences have got their owners, ``[N]`` each.

        Args:
            votes: of the pages of each layer that has a router, in their order, ``[pages of it, experts]``.
        """
        taken: Counter[int] = Counter()
        arrays = (x.tolist() for x in (serials, units, numbers, owners, homes))
        for sequence, unit, page_idx, owner, home in zip(*arrays, strict=True):
            layer, first = unit // self._streams, []
            if layer in votes:
                ranked = sorted((-n, expert) for expert, n in enumerate(votes[layer][taken[layer]].tolist()) if n)
                first = [[expert, -n] for n, expert in ranked[:TOP_VOTES]]
                taken[layer] += 1
            self._write("seal", seq=sequence, **self._where(unit), page=page_idx, owner=owner, home=home, votes=first)

    def store(self, serials: Ints, units: Ints, numbers: Ints, slots: Ints, formats: Ints) -> None:
        """Pages lie in some slots now, ``[N]`` each."""
        arrays = (x.tolist() for x in (serials, units, numbers, slots, formats))
        for sequence, unit, page_idx, slot, page_format in zip(*arrays, strict=True):
            where = self._where(unit)
            self._write("store", seq=sequence, **where, page=page_idx, slot=slot, codec=page_format)

    def free(self, slots: Sequence[int], why: str) -> None:
        """Slots are empty again."""
        if slots:
            self._write("free", why=why, slots=list(slots))

    def visit(self, layer: int, slots: Iterable[int]) -> None:
        """A lookup has chosen these slots."""
        self._write("visit", layer=layer, slots=list(slots))

    def close(self) -> None:
        """Writes what is left. Nothing may be traced afterwards."""
        self._file.close()

    def _where(self, unit: int) -> dict[str, int]:
        layer, head = divmod(unit, self._streams)
        return {"layer": layer, "head": head} if self._streams > 1 else {"layer": layer}

    def _write(self, event: str, **facts: Any) -> None:
        self._file.write(json.dumps({"event": event, "step": self._step, **facts}, separators=(",", ":")) + "\n")


def obstacle(folder: str | Path) -> str | None:
    """Why no trace can be written into a folder, which is made where there is none; None: it can."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return str(error)


def path_of(folder: str | Path, rank: int) -> Path:
    """The file of a rank's trace."""
    return Path(folder) / f"trace-rank{rank}.jsonl"


@dataclass
class RankTrace:
    """What a rank's trace tells, added up."""

    facts: dict[str, Any]
    """Of the cache."""
    seconds: list[float] = field(default_factory=list)
    """When each pass began, ``[passes]``."""
    pages: list[int] = field(default_factory=list)
    """Pages in the pool then."""
    kv_bytes: list[int] = field(default_factory=list)
    seals: list[Seal] = field(default_factory=list)
    stored: Counter[str] = field(default_factory=Counter)
    """Pages that have come to lie here, by codec."""
    freed: Counter[str] = field(default_factory=Counter)
    """Pages that have gone, by reason."""
    visits: int = 0
    """Of sparse lookups, once per page and pass."""
    distances: Counter[int] = field(default_factory=Counter)
    """Of visits but the first of a page: passes since the last one."""
    cut_off: bool = False
    """The last line is not whole: the rank was killed."""

    @property
    def rank(self) -> int:
        return int(self.facts["rank"])


class Seal(NamedTuple):
    """A page that a rank's own sequence has filled."""

    sequence: int
    layer: int
    head: int
    page_idx: int
    owner: int
    home: int
    """Its home expert, -1 at a layer without a router."""
    votes: tuple[tuple[int, int], ...]
    """The first few experts and how many of the page's tokens chose them."""


def read(folder: str | Path) -> list[RankTrace]:
    """The traces of all ranks in a folder, in their order; they may have been packed with gzip.

    Raises:
        ValueError: there is none, a rank's is missing or of another run, or a line cannot be read.
    """
    found = sorted(Path(folder).glob("trace-rank*.jsonl*")) if Path(folder).is_dir() else []
    if not found:
        raise UsageError(
            f'{folder}: no trace-rankN.jsonl in there; record one with "trace": "{folder}" in pikv\'s settings'
        )
    traces = sorted((read_rank(path) for path in found), key=lambda trace: trace.rank)
    sizes = {trace.facts["ranks"] for trace in traces}
    if len(sizes) > 1 or [trace.rank for trace in traces] != list(range(max(sizes))):
        ranks = ", ".join(f"{t.rank} of {t.facts['ranks']}" for t in traces)
        raise UsageError(f"{folder}: the traces of one run belong together, but these are of ranks {ranks}")
    return traces


def read_rank(path: Path) -> RankTrace:
    """One rank's trace.

    Raises:
        ValueError: naming the line that cannot be read.
    """
    trace: RankTrace | None = None
    last_visit: dict[int, int] = {}  # per slot
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for number, line in enumerate(file, 1):
            try:
                facts = checks.parse_json(line)
                event = facts.pop("event", None)
                if trace is not None:
                    _take(trace, event, facts, last_visit)
                    continue
            except (ValueError, AttributeError, KeyError, TypeError, IndexError):  # no JSON, or none of ours
                if trace is not None and not line.endswith("\n"):
                    trace.cut_off = True
                    break
                raise UsageError(f"{path}:{number}: not a line of a trace: {line[:60]!r}") from None
            if event != "start" or facts.get("version") != VERSION or not facts.keys() >= FACTS:
                raise UsageError(f"{path}:{number}: not the beginning of a trace of version {VERSION}")
            trace = RankTrace(facts)
    if trace is None:
        raise UsageError(f"{path}: empty; was the rank killed as it began?")
    return trace


def _take(trace: RankTrace, event: str, facts: dict[str, Any], last_visit: dict[int, int]) -> None:
    """One line's share."""
    if event == "step":
        trace.seconds.append(facts["seconds"])
        trace.pages.append(facts["pages"])
        trace.kv_bytes.append(facts["kv"])
    elif event == "seal":
        votes = tuple((expert, count) for expert, count in facts["votes"])
        where = facts["seq"], facts["layer"], facts.get("head", 0), facts["page"]
        trace.seals.append(Seal(*where, facts["owner"], facts["home"], votes))
    elif event == "store":
        trace.stored[trace.facts["codecs"][facts["codec"]]["codec"]] += 1
        last_visit.pop(facts["slot"], None)
    elif event == "free":
        trace.freed[facts["why"]] += len(facts["slots"])
    elif event == "visit":
        trace.visits += len(facts["slots"])
        for slot in facts["slots"]:
            before = last_visit.get(slot)
            if before is not None:
                trace.distances[max(1, facts["step"] - before)] += 1
            last_visit[slot] = facts["step"]
