"""What `pikv plan --measure` times: collectives of a group of ranks, and real decode passes of the cache on them.

All ranks make the same passes over random keys and values, with the cache's own code, kernels and process group. They
are processes on this machine (`local_ranks`), or those of a launcher that runs `pikv plan --measure` on all of them
(`rank`).
"""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track

from pikv_ds import launch_env
from pikv_ds.config import PiKVConfig
from pikv_ds.core.cache import ExpertShardedKVCache
from pikv_ds.core.exchange import Exchange, make_group
from pikv_ds.core.shape import ModelShape
from pikv_ds.errors import UsageError
from pikv_ds.observe.metrics import wire_bytes_per_token_layer
from pikv_ds.tools import local_ranks as ranks
from pikv_ds.tools.plan import costs
from pikv_ds.tools.plan.costs import Work

TIMEOUT_S = 300.0
PASSES = 24
"""Decode passes that are timed of each load; one of them seals a page of every sequence."""
ROUNDS, WARMUP = 20, 3


class Case(NamedTuple):
    """A load: so many sequences per rank of so many tokens, at so many layers."""

    layers: int
    batch: int
    context: int


FITTED = [
    Case(2, 1, 1024), Case(2, 4, 1024), Case(4, 2, 2048), Case(2, 1, 8192),
    Case(4, 3, 4096), Case(6, 1, 4096), Case(24, 1, 1024), Case(16, 2, 2048),
]  # fmt: skip
HELD_OUT = [Case(3, 2, 3072), Case(5, 1, 6144), Case(32, 1, 2048)]
GPU_CONTEXT = 8
"""How many times longer contexts are on GPUs, so that reading pages shows beside launching kernels."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """What to measure."""

    shape: ModelShape
    codecs: list[Any]
    """As in a configuration."""
    page_size: int
    partial_dtype: str
    rounds: int
    """Times that each load is measured; the median counts."""
    fitted: list[Case]
    held_out: list[Case]
    """Loads that are only predicted, to see how far off predictions are."""

    def to_json(self) -> str:
        shape = {**vars(self.shape), "dtype": str(self.shape.dtype).removeprefix("torch.")}
        return json.dumps({**vars(self), "shape": shape})

    @classmethod
    def from_json(cls, text: str) -> Spec:
        facts = json.loads(text)
        shape = ModelShape(**{**facts["shape"], "dtype": getattr(torch, facts["shape"]["dtype"])})
        cases = {name: [Case(*case) for case in facts[name]] for name in ("fitted", "held_out")}
        return cls(**{**facts, **cases, "shape": shape})


def network(exchange: Exchange, shape: ModelShape) -> tuple[float, float]:
    """Seconds per collective, and per byte that a rank sends: of queries that go out and partials that come back."""
    if exchange.size == 1:
        return 0.0, 0.0
    points: list[tuple[int, float]] = []
    for rows in (1, 4, 16, 64, 256):
        counts = [rows] * exchange.size
        query = torch.randn(rows, shape.num_heads, shape.head_dim).to(exchange.device, shape.dtype)
        others = rows * (exchange.size - 1)
        out = torch.randn(others, shape.num_heads, shape.value_dim, device=exchange.device)
        lse = torch.randn(others, shape.num_heads, device=exchange.device)
        before, times = sum(exchange.sent_bytes.values()), []
        for _ in range(ROUNDS + WARMUP):
            exchange.all_gather([0])  # together
            started = _now(exchange.device)
            handle = exchange.dispatch(query, counts)
            handle.wait()
            exchange.combine(handle, out, lse)
            times.append(_now(exchange.device) - started)
        sent = sum(exchange.sent_bytes.values()) - before
        points.append((sent // (ROUNDS + WARMUP) // 2, statistics.median(times[WARMUP:]) / 2))
    matrix = torch.tensor([[1.0 / t, n / t] for n, t in points], dtype=torch.float64)
    scale = matrix.amax(0)
    alpha, beta = (costs.nonnegative(matrix / scale, torch.ones(len(points), dtype=torch.float64)) / scale).tolist()
    return alpha, beta


def work_of(cache: ExpertShardedKVCache, case: Case) -> Work:
    """What a rank has to do in a pass of such a load; its pages are those that lie on it now."""
    layers, wire = cache.shape.num_layers, wire_bytes_per_token_layer(cache)
    pages = {
        f.codec.label: n * f.size.page / layers
        for f, n in zip(cache.formats, cache.table.num_pages_by_format(), strict=True)
    }
    return Work(layers, case.batch * cache.exchange.size, case.batch * wire, pages)


def timed_passes(exchange: Exchange, spec: Spec, codec: Any, case: Case) -> tuple[Work, float]:
    """Real decode passes of a load; what each rank did, and the mean seconds of a pass.

    The pages that are sealed in one of them, and sent in the next, count with their share of a page's passes.
    """
    shape = dataclasses.replace(spec.shape, num_layers=case.layers)
    settings = {"codec": codec, "page_size": spec.page_size, "partial_dtype": spec.partial_dtype}
    config = PiKVConfig.from_dict({**settings, "placement": "interleave", "timeout_s": TIMEOUT_S})
    cache = ExpertShardedKVCache(shape, config, exchange, exchange.device)
    batch = cache.new_batch(case.batch)
    size = spec.page_size
    context = max(1, case.context // size) * size
    context += max(0, size - PASSES // 2 - WARMUP)  # so that pages fill up on the way
    generator = torch.Generator(device=exchange.device).manual_seed(exchange.rank)
    run(cache, batch, context, generator, prompt=True)
    every = [run(cache, batch, 1, generator) for _ in range(PASSES + WARMUP)]
    times = every[WARMUP:]
    cache.begin_step(None, [])
    work = work_of(cache, case)
    cache.release(batch)
    cache.begin_step(None, [])
    usual, full = statistics.median(times), min(size, PASSES // 2 + WARMUP) - 1  # pages fill up in that pass
    return work, usual + (sum(every[full : full + 2]) - 2 * usual) / size


def run(cache: ExpertShardedKVCache, batch: Any, new: int, generator: torch.Generator, prompt: bool = False) -> float:
    """One pass over random tensors; its seconds. Prompts are stored, and not attended to."""
    shape, num = cache.shape, new * len(batch)

    def normal(heads: int) -> torch.Tensor:
        return torch.randn(num, heads, shape.head_dim, generator=generator, device=cache.device).to(shape.dtype)

    latent = shape.latent_dim is not None
    query, key = normal(shape.num_heads), normal(shape.num_kv_heads)
    value = None if latent else normal(shape.num_kv_heads)
    started = _now(cache.device)
    cache.begin_step(batch, [new] * len(batch))
    for layer in range(shape.num_layers):
        cache.attend(batch, layer, query, key, value, shape.head_dim**-0.5, attend_prompts=not prompt)
        cache.routed(batch, layer, None)
    return _now(cache.device) - started


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(exchange: Exchange, spec: Spec, progress: Callable[[list[Any]], Iterable[Any]]) -> dict[str, Any]:
    """All of it on this rank: the network, then the loads, codec after codec, round by round.

    Returns:
        ``costs``, and ``points``: each load with its predicted and measured seconds.
    """
    alpha, beta = network(exchange, spec.shape)
    labels = [PiKVConfig.from_dict({"codec": codec}).codec.codecs[0].label for codec in spec.codecs]
    todo = [(i, case) for case in (*spec.fitted, *spec.held_out) for i in range(len(labels))]
    times: dict[tuple[int, Case], list[float]] = {}
    works: dict[tuple[int, Case], Work] = {}
    order = random.Random(0)  # a slow minute of a shared machine must not meet the same loads in each round
    for i, case in progress([key for _ in range(spec.rounds) for key in order.sample(todo, len(todo))]):
        works[i, case], seconds = timed_passes(exchange, spec, spec.codecs[i], case)
        times.setdefault((i, case), []).append(seconds)
    mine = [statistics.median(times[key]) for key in todo]
    reading = [sum(works[key].pages.values()) for key in todo]
    both = torch.tensor(mine + reading, device=exchange.device)
    means = torch.stack(exchange.all_gather_floats(both, [len(both)] * exchange.size, kind="figures")).mean(0)
    found: dict[tuple[int, Case], tuple[Work, float]] = {}
    for key, seconds, num_bytes in zip(todo, *means.view(2, -1).tolist(), strict=True):
        found[key] = dataclasses.replace(works[key], pages={labels[key[0]]: num_bytes}), seconds
    fitted = costs.fit(alpha, beta, [found[key] for key in todo if key[1] in spec.fitted])
    points = [
        {"codec": labels[i], **case._asdict(), "held_out": case in spec.held_out,
         "predicted_s": fitted.seconds(found[i, case][0]), "measured_s": found[i, case][1]}
        for i, case in todo
    ]  # fmt: skip
    errors = [p["predicted_s"] / p["measured_s"] - 1 for p in points if p["held_out"]]
    return {"costs": dataclasses.asdict(dataclasses.replace(fitted, errors=errors)), "points": points}


def rank(spec: Spec) -> dict[str, Any]:
    """One rank of a job, from its process group to its end; what `measure` returns."""
    launch_env.prepare()
    world, device, group = launch_env.world(), launch_env.device(), None
    if world.size > 1:
        place = {"store": launch_env.store(), "rank": world.rank, "world_size": world.size}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **place)
        group = make_group(dist.group.WORLD, TIMEOUT_S)
    exchange = Exchange(group, device, getattr(torch, spec.partial_dtype))

    def progress(todo: list[Any]) -> Iterable[Any]:
        quiet = world.rank != 0 or not sys.stderr.isatty()
        console = Console(stderr=True)
        return track(todo, f"{world.size} ranks", console=console, transient=True, disable=quiet)

    with torch.no_grad():
        result = measure(exchange, spec, progress)
    exchange.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    return result


def local_ranks(spec: Spec, num_ranks: int) -> dict[str, Any]:
    """What `measure` returns for so many ranks on this machine, each a process.

    Raises:
        ValueError: one has failed; it has said why.
    """
    with tempfile.TemporaryDirectory(prefix="pikv-measure-") as folder:
        spec_path, out = Path(folder) / "spec.json", Path(folder) / "result.json"
        spec_path.write_text(spec.to_json())
        code = ranks.run([sys.executable, "-m", "pikv_ds.tools.plan.measure", str(spec_path), str(out)], num_ranks)
        if code:
            raise UsageError(f"--measure: the job of {num_ranks} ranks ended with exit code {code}")
        return json.loads(out.read_text())


if __name__ == "__main__":
    found = rank(Spec.from_json(Path(sys.argv[1]).read_text()))
    if launch_env.world().rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
