"""`pikv plan --simulate`: decode passes on more ranks than there are. Simulated, never measured.

Where pages lie is computed as the cache computes it, bound included, from experts that a model really chose: long
sequences are pieced together from runs of pages of a recorded trace (`pikv_ds.core.trace`), so that neighbours stay
neighbours and the routing keeps its skew. All ranks meet at every layer, so a layer takes as long as its fullest rank.
Two levels of network, within and between nodes, work side by side; what one takes is a start-up time, a time per
message and a time per byte. Those figures, and the kernels' rates, are assumptions (`Cluster`): set your own.

An expert-parallel group has at most as many ranks as experts; more ranks are several groups that know nothing of each
other's KV. A group may also share its KV node by node (the setting ``group_size``), as queries to every rank of a
large group are many: that is simulated beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pikv_ds import checks
from pikv_ds.config import PiKVConfig
from pikv_ds.core.placement import owner_limit
from pikv_ds.core.rebalance import pack
from pikv_ds.core.shape import ModelShape
from pikv_ds.core.trace import RankTrace
from pikv_ds.errors import UsageError
from pikv_ds.policies.topology import Topology
from pikv_ds.tools.plan import planner
from pikv_ds.tools.plan.planner import DP, PLAN_BYTES, Load

PLACEMENTS = ("interleave", "expert", "eplb")
"""What is simulated; `interleave` is p mod c."""
MOST = 1e9
"""Of an assumed figure."""
LAYERS = 4
"""Layers of the trace that stand for all."""


@dataclass(frozen=True)
class Level:
    """One level of the network, as a rank sees it in an all-to-all."""

    start_us: float
    message_us: float
    """Per peer."""
    gb_per_s: float

    def seconds(self, peers: int, num_bytes: float) -> float:
        return (self.start_us + self.message_us * peers) * 1e-6 + num_bytes / (self.gb_per_s * 1e9) if peers else 0.0


@dataclass(frozen=True)
class Cluster:
    """Assumed figures of a cluster of H200s: 80 % of the memory's 4.8 TB/s, NVLink, 400 Gb/s per GPU between nodes,
    and the host's and launches' costs of a well-tuned decode. None of it was measured by this project."""

    ranks_per_node: int = 8
    inside: Level = Level(10.0, 0.1, 350.0)
    """Within a node."""
    between: Level = Level(15.0, 0.5, 45.0)
    """Between nodes."""
    step_us: float = 200.0
    """Per pass."""
    layer_us: float = 40.0
    """Per layer."""
    row_us: float = 0.05
    """Per layer and query that a rank answers."""
    read_gb_per_s: float = 3840.0
    """At which pages are read."""

    @classmethod
    def of(cls, changes: Mapping[str, Any]) -> Cluster:
        """The assumed one with other figures, as in ``{"layer_us": 20, "between": {"gb_per_s": 90}}``.

        Raises:
            ValueError: by name.
        """
        return _changed(cls(), changes, "")

    def all_to_all(self, ranks: int, bytes_per_peer: float) -> float:
        """Seconds of one, with so many bytes to each of the other ranks."""
        near = min(ranks, self.ranks_per_node) - 1
        far = ranks - 1 - near
        return max(self.inside.seconds(near, near * bytes_per_peer), self.between.seconds(far, far * bytes_per_peer))

    def between_nodes(self, ranks: int) -> int:
        """Peers of a rank on other nodes."""
        return max(0, ranks - self.ranks_per_node)


def _changed(value: Any, changes: Any, path: str) -> Any:
    if not isinstance(changes, Mapping):
        raise UsageError(f"--assume {path or 'JSON'}: use an object with figures")
    known = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    for key, change in changes.items():
        if key not in known:
            raise UsageError(f"--assume {path}{checks.named(key)}: unknown; choose one of {', '.join(known)}")
        if dataclasses.is_dataclass(known[key]):
            known[key] = _changed(known[key], change, f"{path}{key}.")
        elif isinstance(change, bool) or not isinstance(change, (int, float)) or not 0 <= change <= MOST:
            raise UsageError(f"--assume {path}{key} = {checks.shown(change)}: use a number from 0 to {MOST:g}")
        elif key in ("gb_per_s", "read_gb_per_s") and change <= 0:
            raise UsageError(f"--assume {path}{key} = {checks.shown(change)}: use a number above 0")
        elif key == "ranks_per_node" and change not in range(1, int(MOST)):
            raise UsageError(f"--assume {path}{key} = {checks.shown(change)}: use a whole number above 0")
        else:
            known[key] = int(change) if key == "ranks_per_node" else float(change)
    return type(value)(**known)


@dataclass(frozen=True)
class Point:
    """One way to keep the KV, on so many ranks."""

    way: str
    ranks: int
    group: int
    """Ranks over which the experts are spread."""
    step_s: float
    """Attention of a decode pass, all layers."""
    fullest: float
    """Bytes of pages on the fullest rank."""
    skew: float
    """Pages of a layer's fullest rank over the mean, mean over layers."""
    between_bytes: float
    """That a rank sends to other nodes in a pass."""


@dataclass(frozen=True)
class Routing:
    """Home experts of a layer's recorded pages."""

    experts: Tensor
    """int64 ``[pages, votes]``, the most chosen first, -1 where fewer were chosen."""
    starts: list[tuple[int, int]]
    """First page and number of pages of each recorded sequence."""

    def draw(self, sequences: int, pages: int, generator: torch.Generator) -> Tensor:
        """Recorded pages for each page of some sequences, ``[sequences, pages]``: runs of neighbours, put together."""
        out = torch.empty(sequences, pages, dtype=torch.int64)
        for sequence in range(sequences):
            at = 0
            while at < pages:
                first, count = self.starts[int(torch.randint(len(self.starts), (1,), generator=generator))]
                skip = int(torch.randint(count, (1,), generator=generator))
                run = min(count - skip, pages - at)
                out[sequence, at : at + run] = torch.arange(first + skip, first + skip + run)
                at += run
        return out


def routings(traces: Sequence[RankTrace], num_experts: int) -> list[Routing]:
    """Some layers of a trace, evenly spread over those with routers.

    Raises:
        ValueError: it is of another number of experts, or has no pages with a home expert.
    """
    recorded = traces[0].facts["experts"]
    if recorded != num_experts:
        raise UsageError(
            f"--simulate: the trace is of a model with {recorded} experts, this one has {num_experts}; record one of "
            'this model, with "trace": "FOLDER" in its settings'
        )
    by_layer: dict[int, dict[tuple[int, int], dict[int, tuple[int, ...]]]] = {}
    for trace in traces:
        for seal in trace.seals:
            if seal.home >= 0 and seal.head == 0:
                pages = by_layer.setdefault(seal.layer, {}).setdefault((trace.rank, seal.sequence), {})
                pages[seal.page_idx] = tuple(expert for expert, _ in seal.votes)
    if not by_layer:
        raise UsageError("--simulate: no page in the trace has a home expert; was a prompt ever longer than a page?")
    names = sorted(by_layer)
    count = min(LAYERS, len(names))
    chosen = [names[i * len(names) // count] for i in range(count)]
    out = []
    for layer in chosen:
        lists = [[pages[i] for i in sorted(pages)] for pages in by_layer[layer].values()]
        width = max(len(votes) for pages in lists for votes in pages)
        rows = [[*votes, *[-1] * (width - len(votes))] for pages in lists for votes in pages]
        firsts = [sum(map(len, lists[:i])) for i in range(len(lists))]
        out.append(Routing(torch.tensor(rows), list(zip(firsts, map(len, lists), strict=True))))
    return out


def place(
    routing: Routing, drawn: Tensor, lengths: Sequence[int], page_size: int, topology: Topology, name: str
) -> Tensor:
    """Pages of all sequences that each rank holds at a layer, int64 ``[ranks]``: each sequence placed as its rank
    places it (`pikv_ds.ops.reference.place_pages`), all of them side by side.

    Args:
        drawn: recorded pages of each sequence, ``[sequences, pages]``.
        lengths: tokens of each sequence; sequence ``i`` is rank ``i mod ranks``'s own.
    """
    ranks, sequences = topology.num_ranks, len(lengths)
    is_source = torch.arange(sequences)[:, None] % ranks == torch.arange(ranks)
    counts = torch.tensor([n // page_size for n in lengths])
    blocks = topology.homes or tuple((topology.owner(expert),) for expert in range(topology.num_experts))
    copies = torch.tensor([len(owners) for owners in blocks])
    homes = torch.tensor([[*owners, *[-1] * (int(copies.max()) - len(owners))] for owners in blocks])
    loads = torch.zeros(sequences, ranks, dtype=torch.int64)
    for page in range(int(counts.max())):
        if name == "interleave":
            wanted = torch.full((sequences, 1), page % ranks)
        else:
            experts = routing.experts[drawn[:, page]]
            owner = homes[experts.clamp(min=0), page % copies[experts.clamp(min=0)]]
            wanted = torch.where(experts >= 0, owner, -1)
        room = loads < owner_limit((page + 1) * page_size, page_size, topology) - is_source.long()
        fits = (wanted >= 0) & room.gather(1, wanted.clamp(min=0))
        first = wanted.gather(1, fits.long().argmax(1, keepdim=True))[:, 0]
        least = torch.where(room, loads, torch.iinfo(torch.int64).max).argmin(1)
        chosen = torch.where(fits.any(1), first, least)
        loads[torch.arange(sequences), chosen] += (page < counts).long()
    return loads.sum(0)


@dataclass
class Simulation:
    """A model under a growing number of ranks, each with sequences of its own."""

    shape: ModelShape
    configs: Mapping[str, PiKVConfig]
    """Ways to keep the KV, beside DP attention and p mod c; their placements are not looked at."""
    traces: Sequence[RankTrace]
    cluster: Cluster
    context: int
    """Mean tokens of a sequence."""
    per_rank: int
    """Sequences of each rank."""
    spread: float = 0.5
    """Standard deviation of the logarithm of a sequence's length; 0: all are equally long."""
    progress: Callable[[list[Any]], Iterable[Any]] = field(default=lambda todo: todo)

    @property
    def page_size(self) -> int:
        return next(iter(self.configs.values())).page_size

    def run(self, most_ranks: int) -> list[Point]:
        """On one node, two, four, … up to so many ranks.

        Raises:
            ValueError: the trace is of another model, or a configuration cannot be planned.
        """
        layers = routings(self.traces, self.shape.num_experts)
        node = self.cluster.ranks_per_node
        sizes = [node * 2**i for i in range(64) if node * 2**i <= most_ranks]
        todo: list[tuple[int, str, int]] = []
        for ranks in sizes:
            group = self._divisor(ranks)
            todo += [(group, name, group) for name in PLACEMENTS]
            if group > node:
                todo.append((group, "expert", self._divisor(node)))
        found: dict[tuple[int, str, int], list[Point]] = {}
        for key in self.progress(list(dict.fromkeys(todo))):
            found[key] = self._points(layers, *key)
        return [
            dataclasses.replace(point, ranks=ranks)
            for ranks in sizes
            for key, points in found.items()
            if key[0] == self._divisor(ranks)
            for point in points
        ]

    def _divisor(self, ranks: int) -> int:
        """The most of so many ranks over which the experts can be spread evenly."""
        return max(n for n in range(1, ranks + 1) if self.shape.num_experts % n == 0)

    def _lengths(self, count: int, generator: torch.Generator) -> list[int]:
        drawn = torch.exp(self.spread * torch.randn(count, generator=generator, dtype=torch.float64))
        return [max(1, round(x)) for x in (drawn / drawn.mean() * self.context).tolist()]

    def _place(
        self, routing: Routing, lengths: list[int], ranks: int, name: str, generator: torch.Generator
    ) -> Tensor:
        """Pages of a layer on each of the ranks that share their KV, int64 ``[ranks]``."""
        topology = Topology(self.shape.num_experts, ranks)
        if name == "eplb":  # packed by what the trace tells of the layer
            homes = torch.bincount(routing.experts[:, 0], minlength=self.shape.num_experts).tolist()
            topology = dataclasses.replace(topology, homes=pack(homes, topology, 1.1, 1))
        drawn = routing.draw(len(lengths), max(1, max(lengths) // self.page_size), generator)
        return place(routing, drawn, lengths, self.page_size, topology, name)

    def _points(self, routings: list[Routing], group: int, name: str, sharing: int) -> list[Point]:
        """An expert-parallel group, of which so many ranks after each other share their KV."""
        generator = torch.Generator().manual_seed(0)  # every placement gets the same sequences
        lengths = self._lengths(group * self.per_rank, generator)  # sequence i is rank i mod group's
        parts = [[n for i, n in enumerate(lengths) if i % group // sharing == p] for p in range(group // sharing)]
        held = [
            torch.cat([self._place(routing, part, sharing, name, generator) for part in parts]) for routing in routings
        ]
        layers, cluster = self.shape.num_layers, self.cluster
        skew = sum(float(x.max() * group / x.sum()) for x in held) / len(held)
        layer_share = sum(float(x.max() / x.sum()) for x in held) / len(held)  # of a layer's pages, at that layer
        fullest_share = float(torch.stack(held).sum(0).max() / torch.stack(held).sum())  # of all pages, all layers
        load = Load(self.context, self.per_rank * sharing, sharing)
        out = self._not_shared(lengths, group) if name == "interleave" else []
        plain = {"p mod c": PiKVConfig(page_size=self.page_size)}
        for label, config in plain.items() if name == "interleave" else self.configs.items():
            wire = planner.plan(self.shape, config, load).wire - PLAN_BYTES * (sharing - 1)
            peer = wire / layers / max(1, sharing - 1)  # to one of them at a layer, queries and partials
            pages = sum(lengths) / self.context * planner.sequence_bytes(self.shape, config, self.context)
            reading = layer_share * pages / layers / (cluster.read_gb_per_s * 1e9)
            host = (cluster.layer_us + cluster.row_us * load.batch) * 1e-6
            step = cluster.step_us * 1e-6 + cluster.all_to_all(sharing, PLAN_BYTES)
            step += layers * (host + 2 * cluster.all_to_all(sharing, peer / 2) + reading)
            far = cluster.between_nodes(sharing) * (layers * peer + PLAN_BYTES)
            where = ", KV shared per node" if sharing < group else ""
            title = label if name == "interleave" else f"{label}, {name}{where}"
            out.append(Point(title, group, group, step, fullest_share * pages, skew, far))
        return out

    def _not_shared(self, lengths: list[int], group: int) -> list[Point]:
        """Each rank keeps its own sequences: uncompressed, and with each configuration's codec (``group_size`` 1)."""
        per_token = {DP: float(self.shape.token_bytes)}
        for label, config in self.configs.items():
            num_bytes = planner.sequence_bytes(self.shape, config, self.context) / self.context
            if num_bytes < 0.99 * self.shape.token_bytes:
                per_token[f"{label}, not shared"] = num_bytes
        most, total = max(sum(lengths[rank::group]) for rank in range(group)), sum(lengths)
        layer_us = self.cluster.layer_us + self.cluster.row_us * self.per_rank
        host = (self.cluster.step_us + self.shape.num_layers * layer_us) * 1e-6
        rate = self.cluster.read_gb_per_s * 1e9
        return [
            Point(way, group, group, host + most * size / rate, most * size, most * group / total, 0.0)
            for way, size in per_token.items()
        ]


def read_assumptions(text: str) -> Mapping[str, Any]:
    """``--assume``: JSON, or the path of a file with it.

    Raises:
        ValueError: it is neither.
    """
    try:
        found = checks.parse_json(text) if text.lstrip().startswith("{") else checks.read_json(text)
    except UsageError as error:
        raise UsageError(
            f"--assume {checks.named(text)}: {error}; write a JSON object, or name a file with one"
        ) from None
    return found
