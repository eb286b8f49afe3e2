"""`pikv plan`: what a model's KV cache takes, before anything runs.

Everything here is arithmetic on the layouts that the cache itself uses, slabs, tails and padding included; tests
compare it with what a real cache allocates. Sizes are bytes per rank unless they say otherwise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pikv_ds import checks
from pikv_ds.config import PAGE_SIZES, PiKVConfig
from pikv_ds.core.formats import make_formats, num_streams
from pikv_ds.core.placement import rank_bound
from pikv_ds.core.shape import ModelShape
from pikv_ds.core.step import Announcement
from pikv_ds.errors import UsageError
from pikv_ds.policies.budgets import page_limits, prompt_pages
from pikv_ds.policies.topology import Topology
from pikv_ds.tools.plan.costs import Costs, Work

MOST_SIZE = 2**20
"""Of what a config.json says of a model's shape: layers, heads, experts, channels."""
HOST_BYTES_PER_PAGE = 128
"""Of the page table on the host: a tuple of two numbers and its place in a list. An estimate."""

DP = "DP attention"

PLAN_BYTES = 8 * len(Announcement._fields)
"""That a rank tells each other one per pass, whatever it does."""

PRESETS: dict[str, dict[str, int]] = {
    "mixtral-8x7b": {"num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "num_experts": 8},
    "mixtral-8x22b": {"num_layers": 56, "num_heads": 48, "num_kv_heads": 8, "head_dim": 128, "num_experts": 8},
    "qwen3-30b-a3b": {"num_layers": 48, "num_heads": 32, "num_kv_heads": 4, "head_dim": 128, "num_experts": 128},
    "qwen3-235b-a22b": {"num_layers": 94, "num_heads": 64, "num_kv_heads": 4, "head_dim": 128, "num_experts": 128},
    "deepseek-v3": {
        "num_layers": 61, "num_heads": 128, "num_kv_heads": 1, "head_dim": 576, "num_experts": 256, "latent_dim": 512,
    },
}  # fmt: skip
"""Shapes by name, from the models' published configurations. Of latent attention (DeepSeek-V3) a head is the latent
and the rotary key."""


def shape_of(model: str, dtype: torch.dtype) -> ModelShape:
    """A model's shape from a preset's name, a Hugging Face folder, or its ``config.json``.

    Raises:
        ValueError: there is none of the name, or a size is missing in it.
    """
    if model.lower() in PRESETS:
        return ModelShape(dtype=dtype, **PRESETS[model.lower()])  # type: ignore[arg-type]
    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    if not path.is_file():
        raise UsageError(f"--model {model}: no preset ({', '.join(PRESETS)}), and no folder with a config.json")
    try:
        config = checks.read_json(path)
    except UsageError as error:
        raise UsageError(f"--model {model}: {path} cannot be read ({error})") from None
    config = config.get("text_config", config) if isinstance(config, dict) else config
    if not isinstance(config, dict):
        raise UsageError(f"--model {model}: {path} has no JSON object in it")

    def size(name: str, otherwise: int | None = None) -> int:
        value = config.get(name)
        if value is None and otherwise is not None:
            return otherwise
        if value is None:
            raise UsageError(f"--model {model}: {path} names no {name}")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_SIZE:
            raise UsageError(
                f"--model {model}: {path}: {name} = {checks.shown(value)}: use a whole number from 1 to {MOST_SIZE}"
            )
        return value

    heads, layers = size("num_attention_heads"), size("num_hidden_layers")
    named = [k for k in ("num_local_experts", "num_experts", "n_routed_experts") if config.get(k)]
    experts = size(named[0]) if named else 1
    if config.get("kv_lora_rank"):
        latent = size("kv_lora_rank")
        return ModelShape(layers, heads, 1, latent + size("qk_rope_head_dim"), experts, dtype, latent)
    head_dim = size("head_dim", otherwise=0) or max(1, size("hidden_size") // heads)
    return ModelShape(layers, heads, size("num_key_value_heads", otherwise=heads), head_dim, experts, dtype)


@dataclass(frozen=True)
class Load:
    """What is to be served."""

    context: int
    """Tokens of each sequence."""
    batch: int
    """Sequences of the whole group."""
    ranks: int


@dataclass(frozen=True)
class Plan:
    """One way to keep a load's KV."""

    name: str
    pages: float
    """Bytes of pages, slack included, on the mean rank."""
    most_pages: float
    """On a rank at its bound, whatever the routing."""
    tails: float
    summaries: float
    buffers: float
    """Of one layer's exchange while decoding; reused layer by layer."""
    host: float
    wire: float
    """Bytes that a rank sends per decoded token of each sequence, all layers, step plan included."""
    share: float
    """Device memory of the mean rank over that of DP attention."""
    work: Work | None
    """Of the mean rank in a decode pass; None where a lookup reads a part of the pages: no costs are known then."""

    @property
    def total(self) -> float:
        """Device memory of the mean rank."""
        return self.pages + self.tails + self.summaries + self.buffers

    @property
    def most(self) -> float:
        """Device memory of a rank at its bound."""
        scale = self.most_pages / self.pages if self.pages else 1.0
        return self.most_pages + self.tails + self.summaries * scale + self.buffers


def plan(shape: ModelShape, config: PiKVConfig, load: Load, name: str = "PiKV") -> Plan:
    """What the sharded cache takes.

    Raises:
        ValueError: experts that cannot be spread over the ranks, or calibration files of another model.
    """
    topology = Topology(shape.num_experts if shape.num_experts > 1 else load.ranks, load.ranks)
    config.codec.check(shape.num_layers, shape.num_kv_heads, shape.num_experts)
    formats = make_formats(shape, config, "reference", torch.device("cpu"))
    size, units = config.page_size, shape.num_layers * num_streams(shape, config)
    counts = [load.batch * pages for pages in pages_by_format(shape, config, load.context)]
    bound = rank_bound(load.context, size, topology) // size * load.batch * units
    share = min(1.0, bound / sum(counts)) if sum(counts) else 1.0  # of all pages, on a rank at its bound

    def slabs(pages: Sequence[float], sizes: Sequence[int]) -> float:
        """With the null page, in whole slabs, of one format each."""
        first = next((i for i, n in enumerate(pages) if n), 0)
        return sum(
            math.ceil((n + (i == first)) / config.slab_pages) * config.slab_pages * num_bytes
            for i, (n, num_bytes) in enumerate(zip(pages, sizes, strict=True))
        )

    mean = [n / load.ranks for n in counts]
    own = math.ceil(load.batch / load.ranks)
    token = shape.token_bytes // shape.num_layers
    tails = own * size * token * shape.num_layers
    peers = load.ranks - 1
    element, partial = shape.dtype.itemsize, 4 if config.partial_dtype == "float32" else 2
    query, answer = shape.head_dim * element, shape.value_dim * partial + 4
    others = load.batch - own
    buffers = shape.num_heads * ((peers * own + others) * query + (others + peers * own) * answer) if peers else 0
    wire = own * shape.num_layers * peers * shape.num_heads * (query + answer) + PLAN_BYTES * peers
    work = None
    if config.lookup.summary is None:
        labels = [f.codec.label for f in formats]
        read = {n: k * f.size.page / shape.num_layers for n, k, f in zip(labels, mean, formats, strict=True) if k}
        work = Work(shape.num_layers, load.batch, (wire - PLAN_BYTES * peers) / shape.num_layers, read)
    page_bytes, summary_bytes = [f.size.page for f in formats], [f.size.summary for f in formats]
    pages, summaries = slabs(mean, page_bytes), slabs(mean, summary_bytes)
    most = slabs([n * share for n in counts], page_bytes)
    return Plan(
        name, pages, most, tails, summaries, buffers, sum(mean) * HOST_BYTES_PER_PAGE, wire,
        (pages + tails + summaries + buffers) / _whole(shape, load, own), work,
    )  # fmt: skip


def sequence_bytes(shape: ModelShape, config: PiKVConfig, context: int) -> float:
    """Bytes of one sequence's pages, all layers, without slack."""
    formats = make_formats(shape, config, "reference", torch.device("cpu"))
    counts = pages_by_format(shape, config, context)
    return sum(n * f.size.page for n, f in zip(counts, formats, strict=True))


def pages_by_format(shape: ModelShape, config: PiKVConfig, context: int) -> list[float]:
    """Pages of one sequence, all layers and streams, in each of the cache's formats, after it was read as a prompt.

    Of codecs by expert it is the mean over experts that are chosen equally often.
    """
    streams, size, full = num_streams(shape, config), config.page_size, context // config.page_size
    budget, heads, layers = config.budget, shape.num_kv_heads, shape.num_layers
    counts = [0.0] * (len(config.codec.codecs) + (config.demote is not None))
    for layer in range(layers):
        kept = [full] * streams
        if config.retention is not None:
            limits = page_limits(budget, layer, layers, heads, streams, size)
            if budget.prompt < 1 or limits is not None:
                kept = prompt_pages(budget, context, layer, layers, heads, streams, size)
            if limits is not None and budget.pooled:
                kept = [min(sum(kept), sum(limits)) / streams] * streams  # type: ignore[list-item]
            elif limits is not None:
                kept = [min(pair) for pair in zip(kept, limits, strict=True)]
        for stream, pages in enumerate(kept):
            experts = range(shape.num_experts)
            for expert in experts:
                counts[config.codec.choose(layer, stream, expert)] += pages / len(experts)
            if config.demote is not None:
                counts[-1] += full - pages
    return counts


def _whole(shape: ModelShape, load: Load, sequences: float) -> float:
    return sequences * load.context * shape.token_bytes


def baselines(shape: ModelShape, config: PiKVConfig, load: Load) -> list[Plan]:
    """The same load without PiKV, uncompressed and without slack: the least that the others can take."""
    own = math.ceil(load.batch / load.ranks)
    dp = _whole(shape, load, own)
    tp = _whole(shape, load, load.batch) / min(load.ranks, shape.num_kv_heads)
    dcp = _whole(shape, load, load.batch) / load.ranks
    exact = plan(shape, PiKVConfig(page_size=config.page_size, partial_dtype=config.partial_dtype), load)

    def of(name: str, pages: float, rows: float, wire: float) -> Plan:
        layers = shape.num_layers
        work = Work(layers, rows, max(0.0, wire - PLAN_BYTES * (load.ranks - 1)) / layers, {"none": pages / layers})
        return Plan(name, pages, pages, 0, 0, 0, 0, wire, pages / dp, work)

    replicated = "TP, heads replicated" if load.ranks > shape.num_kv_heads else "TP, heads split"
    return [
        of(DP, dp, own, 0),
        of(replicated, tp, load.batch / min(load.ranks, shape.num_kv_heads), 0),
        of("p mod c", dcp, load.batch, exact.wire),
    ]


def seconds(way: Plan, costs: Costs | None) -> float | None:
    """What the attention of a decode pass takes; None where that is not known."""
    if costs is None or way.work is None or any(codec not in costs.byte for codec in way.work.pages):
        return None
    if way.wire == 0:  # nothing is exchanged
        costs = dataclasses.replace(costs, alpha=0.0)
    return costs.seconds(way.work)


def largest(fits: Callable[[int], bool]) -> int:
    """The largest whole number that fits, 0 if not even 1 does; what fits once fits for all smaller ones."""
    low, high = 0, 1
    while high < 2**40 and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def page_size_rule(load: Load) -> int:
    """PiKV's shard size ``sqrt(L / (K G))``: it balances a rank's page summaries, L / (G S), against K = 16 pages that
    are read; the nearest size that there is."""
    best = math.sqrt(load.context / (16 * load.ranks))
    return min((s for s in PAGE_SIZES if s >= 8), key=lambda s: abs(math.log(s / best)))


def facts(result: Plan) -> dict[str, Any]:
    """As plain numbers."""
    return {**dataclasses.asdict(result), "total": result.total, "most": result.most}
