"""The README's numbers, each printed by one of these commands.

    deepspeed --num_accelerators 2 benchmarks/readings.py parity            # tokens and attention outputs
    deepspeed --num_accelerators 2 benchmarks/readings.py bound             # tokens per rank, 90 % on one expert
    deepspeed --num_accelerators 2 benchmarks/readings.py wire              # bytes per token and layer
    deepspeed --num_accelerators 2 benchmarks/readings.py memory            # peak while a prompt is sealed
    deepspeed --num_accelerators 2 benchmarks/readings.py speed             # decoding, fastest against reference ops
    deepspeed --num_accelerators 2 benchmarks/readings.py needles           # codecs and lookups, 18 cases
    deepspeed --num_accelerators 1 benchmarks/readings.py rotation --tokens 768     # rotate and outlier key channels

Everything runs on the reference model (real attention) unless --model names another checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from pikv_ds import launch_env
from pikv_ds.integrations.hf import checkpoints

EXAMPLES = "\n".join(line.strip() for line in (__doc__ or "").splitlines() if "deepspeed" in line)
DS_CONFIG = {"expert_parallel": {"enabled": True}}
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2}


class Bench:
    """The reference model on every rank, sharded with the settings of each measurement."""

    def __init__(self, args: argparse.Namespace) -> None:
        from transformers.utils import logging

        from pikv_ds.tools import reference_model

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        launch_env.prepare()
        self.world = launch_env.world()
        self.console = Console(quiet=self.world.rank != 0, width=110)
        self.dtype = args.dtype
        experts = 6 if self.world.size in (3, 6) else 8
        self.folder = args.model or str(reference_model.build(experts, progress=self.world.rank == 0))
        self.tokenizer = checkpoints.load_tokenizer(self.folder, "--model", padding_side="left")

    def progress(self, text: str) -> None:
        """What is under way, on a terminal."""
        if self.console.is_terminal:
            self.console.print(text.ljust(60), end="\r")

    def load(self) -> Any:
        """The unsharded model."""
        import torch

        return checkpoints.load_model(self.folder, getattr(torch, self.dtype), "--model").to(launch_env.device())

    def engine(self, **pikv: Any) -> Any:
        """The sharded model."""
        import logging

        import pikv_ds

        engine = pikv_ds.initialize(self.load(), {**DS_CONFIG, "pikv": pikv})
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        return engine

    def gather(self, value: Any) -> list[Any]:
        """A value of every rank."""
        import torch.distributed as dist

        if self.world.size == 1:
            return [value]
        out: list[Any] = [None] * self.world.size
        dist.all_gather_object(out, value)
        return out

    def prompt(self, tokens: int, title: str) -> Any:
        """A real document of so many tokens with a question, ``[1, tokens]``."""
        import torch

        from examples.prompts import long_prompt

        ids = long_prompt(self.tokenizer, tokens, "What happens in this text?", title)
        return torch.tensor([ids], device=launch_env.device())


def make_table(title: str, *columns: str) -> Table:
    """An empty table of figures."""
    out = Table(title=title)
    for column in columns:
        out.add_column(column, justify="right")
    return out


TEXTS = ("pride_and_prejudice", "alice", "moby_dick", "pride_and_prejudice")


def parity(args: argparse.Namespace) -> None:
    """Greedy tokens against the unsharded model, and attention outputs against dense attention.

    In bfloat16 expert parallelism alone changes the last bits (it sums the experts in another order),
    so DeepSpeed without PiKV stands beside it; and where tokens differ, the gap between the two
    tokens' logits in float32 stands beside the error that bfloat16 makes in the best ten.
    """
    import torch

    import pikv_ds

    bench = Bench(args)
    rank, low = bench.world.rank, args.dtype == "bfloat16"
    ids = bench.prompt(max(500, args.tokens - 700 * rank), TEXTS[rank % len(TEXTS)])
    settings = {
        "max_new_tokens": args.new_tokens, **GREEDY, "attention_mask": torch.ones_like(ids),
        "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    model = bench.load()
    with torch.inference_mode():
        plain = model.generate(ids, synced_gpus=False, **settings)
    del model
    gc.collect()
    engine = bench.engine(prefill_chunk_tokens=args.chunk)
    shadow = Shadow(pikv_ds.api.attachment_of(engine).store)
    with torch.inference_mode():
        out = engine.module.generate(ids, **settings)
    pikv_ds.detach(engine)
    without = ""
    if low:
        with torch.inference_mode():
            alone = engine.module.generate(ids, synced_gpus=bench.world.size > 1, **settings)
        without = describe(first_difference(alone, plain, ids.shape[1]))
    del engine
    gc.collect()
    at = first_difference(out, plain, ids.shape[1])
    note = describe(at)
    if at is not None:
        note += f"; {tie(bench, plain, out, ids.shape[1], at) if low else 'NOT equal'}"
    agreed = args.new_tokens if at is None else at
    pairs = list(zip(out.logits, plain.logits, strict=True))[: agreed + 1]  # the same tokens before them
    logit_error = max(float((a.float() - b.float()).abs().max()) for a, b in pairs)
    rows = bench.gather((rank, ids.shape[1], note, without, shadow.worst, logit_error))
    table = make_table(
        f"{args.new_tokens} greedy tokens, {args.dtype}, {bench.world.size} rank(s), against unsharded HF",
        "rank", "prompt tokens", "PiKV", "DeepSpeed without PiKV", "max |Δ attention|", "max |Δ logit|",
    )  # fmt: skip
    for r, prompt, text, other, worst, logit in rows:
        table.add_row(str(r), f"{prompt:,}", text, other, f"{worst:.1e}", f"{logit:.1e}")
    bench.console.print(table)


def first_difference(out: Any, want: Any, start: int) -> int | None:
    """Number of the first new token in which two generations differ."""
    differs = (out.sequences[0, start:] != want.sequences[0, start:]).nonzero().flatten().tolist()
    return differs[0] if differs else None


def describe(at: int | None) -> str:
    return "all equal" if at is None else f"differs at token {at}"


def tie(bench: Bench, plain: Any, out: Any, start: int, at: int) -> str:
    """Whether the two tokens are a tie within what bfloat16 does to the unsharded model's own logits.

    Both are compared with the same model in float32 on the same tokens: two logits that are exactly
    ``gap`` apart can change places if rounding moves each by half of it.
    """
    import torch

    exact = checkpoints.load_model(bench.folder, torch.float32).to(launch_env.device())
    with torch.inference_mode():
        truth = exact(plain.sequences[:, : start + at], use_cache=False, logits_to_keep=1).logits[0, -1]
    new, old = out.sequences[0, start + at], plain.sequences[0, start + at]
    gap = float(truth[old] - truth[new])
    best = truth.topk(10).indices
    theirs, ours = (float((g.logits[at][0].float() - truth)[best].abs().max()) for g in (plain, out))
    verdict = "a tie within bf16 rounding" if abs(gap) <= 2 * theirs else "NOT a tie"
    return f"{verdict}: in fp32 {gap:.2g} apart, bf16 is off by {theirs:.2g} (HF) and {ours:.2g} (PiKV)"


class Shadow:
    """Keeps all keys and values whole beside the cache and compares attention outputs, layer by layer,
    with dense attention in float64 at every eighth decoded token."""

    def __init__(self, store: Any) -> None:
        self.store, self.attend, self.worst = store, store.attend, 0.0
        self.kv: dict[int, tuple[Any, Any]] = {}
        store.attend = self

    def __call__(self, batch: Any, layer: int, query: Any, key: Any, value: Any, scale: float, **more: Any) -> Any:
        import torch

        out = self.attend(batch, layer, query, key, value, scale, **more)
        if not any(batch.alive):
            return out
        assert len(batch) == 1, "one sequence at a time: its packed tokens are all there are"
        if layer in self.kv:
            key, value = (torch.cat(pair) for pair in zip(self.kv[layer], (key, value), strict=True))
        self.kv[layer] = key, value
        if len(query) == 1 and len(key) % 8 == 0:
            group = query.shape[1] // key.shape[1]
            k, v = (x.double().repeat_interleave(group, dim=1) for x in (key, value))
            weights = torch.softmax(torch.einsum("thd,nhd->thn", query.double(), k) * scale, dim=-1)
            self.worst = max(self.worst, float((out.double() - torch.einsum("thn,nhd->thd", weights, v)).abs().max()))
        return out


def bound(args: argparse.Namespace) -> None:
    """Tokens per rank and layer when one expert gets 90 % of all choices."""
    import torch

    import pikv_ds

    bench = Bench(args)
    engine = bench.engine()
    attachment = pikv_ds.api.attachment_of(engine)
    store, generator = attachment.store, torch.Generator().manual_seed(bench.world.rank)
    routed = store.routed

    def rigged(batch: Any, layer: int, experts: Any) -> None:  # where pages go, not the model's routing
        hot = (torch.rand(experts.shape, generator=generator) < 0.9).to(experts.device)
        routed(batch, layer, torch.where(hot, args.expert, experts))

    store.routed = rigged
    ids = bench.prompt(args.tokens - 700 * bench.world.rank, TEXTS[bench.world.rank % len(TEXTS)])
    cache = pikv_ds.new_cache(engine)
    with torch.inference_mode():
        engine.module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=args.new_tokens,
            **GREEDY,
        )
    batch, size = cache.batch, store.config.page_size
    length = batch.lengths[0]
    held = [
        [pages * size + (batch.open_tokens(0) if r == bench.world.rank else 0) for r, pages in enumerate(layer)]
        for layer in store.ledger.pages[batch.rows[0]].tolist()
    ]
    g, e = bench.world.size, store.topology.num_experts
    limit = -(-length // g) - (-length // e) + size
    rows = bench.gather((length, limit, max(map(max, held)), sum(map(sum, held)) / len(held)))
    table = make_table(
        f"expert {args.expert} is given 90 % of the choices; {g} rank(s), {e} experts, page size {size}",
        "sequence of rank", "tokens L", "bound", "most on one rank, worst layer", "stored over all ranks",
    )  # fmt: skip
    for r, (n, b, worst, total) in enumerate(rows):
        table.add_row(
            str(r),
            f"{n:,}",
            f"{b:,}",
            f"{worst:,} {'ok' if worst <= b else 'OVER'}",
            f"{total:,.0f}",
        )
    bench.console.print(table)


def wire(args: argparse.Namespace) -> None:
    """Bytes on the wire per decoded token and layer, for a short and a long context."""
    import torch

    import pikv_ds

    bench = Bench(args)
    table = make_table(
        f"bytes per decoded token and layer, {bench.world.size} rank(s), {bench.dtype}",
        "context tokens", "measured", "formula", "step plan, bytes per pass and rank",
    )  # fmt: skip
    engine = bench.engine()
    store = pikv_ds.api.attachment_of(engine).store
    for tokens in (1000, args.tokens):
        store.exchange.sent_bytes.clear()
        store.attention.counters.clear()
        store.shard.counters.clear()
        steps = store.num_steps
        ids = bench.prompt(tokens, TEXTS[bench.world.rank % len(TEXTS)])
        with torch.inference_mode():
            engine.module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.new_tokens, **GREEDY)
        figures = pikv_ds.stats(engine)
        plan = store.exchange.sent_bytes["plan"] / (store.num_steps - steps)
        measured, formula = figures["wire_bytes_per_token_layer"], figures["wire_formula_bytes"]
        table.add_row(f"{tokens:,}", f"{measured:,.1f}", f"{formula:,}", f"{plan:,.0f}")
    bench.console.print(table)


def memory(args: argparse.Namespace) -> None:
    """Peak of KV memory on every rank while a prompt is prefilled, against shard and one layer."""
    import torch

    import pikv_ds

    bench = Bench(args)
    table = make_table(
        f"KV bytes allocated, a prompt of {args.tokens:,} tokens on rank 0, {bench.world.size} rank(s)",
        "rank", "own tokens", "unsharded cache", "shard", "one layer of own prompt", "peak", "peak - shard",
    )  # fmt: skip
    engine = bench.engine(prefill_chunk_tokens=args.chunk)
    store = pikv_ds.api.attachment_of(engine).store
    ids = bench.prompt(args.tokens, TEXTS[0])[: 1 if bench.world.rank == 0 else 0]
    with torch.inference_mode():
        engine.module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, **GREEDY)
    for r in pikv_ds.stats(engine)["per_rank"]:
        layer = r["unsharded_kv_bytes"] / store.shape.num_layers
        table.add_row(
            str(r["rank"]), f"{r['peak_own_tokens']:,}",
            *(f"{x / 2**20:,.2f} MiB" for x in (
                r["unsharded_kv_bytes"], r["held_kv_bytes"], layer, r["peak_kv_bytes"],
                r["peak_kv_bytes"] - r["held_kv_bytes"],
            )),
        )  # fmt: skip
    bench.console.print(table)


def speed(args: argparse.Namespace) -> None:
    """Time per decoded token, the model's own work included, with the fastest and with the reference ops; and what of
    it goes by in the cache (its attention with its exchanges, waits for other ranks included): no op touches the rest.

    They take turns, token by token, within one generation: a slow moment of the machine hits both.
    """
    import statistics
    import time

    import torch
    from transformers import StoppingCriteria

    import pikv_ds
    from pikv_ds.ops import Ops

    bench = Bench(args)
    ops = {name: Ops(name, launch_env.device().type) for name in ("auto", "reference")}
    seconds: dict[str, list[float]] = {name: [] for name in ops}
    in_cache: dict[str, list[float]] = {name: [] for name in ops}
    engine = bench.engine(codec=args.codec)
    store = pikv_ds.api.attachment_of(engine).store
    device = launch_env.device().type
    formats = {name: [dataclasses.replace(f, ops=Ops(name, device, f.layout)) for f in store.formats] for name in ops}
    assert store.shard.formats is store.formats

    attend = store.attend

    def watched(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return attend(*arguments, **options)
        finally:
            Turns.cache += time.perf_counter() - started

    class Turns(StoppingCriteria):
        """Notes each token's time and lets the other ops make the next one."""

        count, before, cache = 0, 0.0, 0.0

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            now = time.perf_counter()
            if self.count > 2:  # the prompt and a first token of each are no measurement
                seconds[list(ops)[(self.count - 1) % 2]].append(now - self.before)
                in_cache[list(ops)[(self.count - 1) % 2]].append(Turns.cache)
            name = list(ops)[self.count % 2]
            store.attention.ops, store.formats[:] = ops[name], formats[name]  # one list, that all of the store reads
            self.count, self.before, Turns.cache = self.count + 1, time.perf_counter(), 0.0
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    store.attend = watched
    ids = bench.prompt(args.tokens, TEXTS[bench.world.rank % len(TEXTS)])
    with torch.inference_mode():
        engine.module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=args.new_tokens,
            stopping_criteria=[Turns()],
            **GREEDY,
        )
    table = make_table(
        f"ms per decoded token, {bench.dtype}, codec {args.codec}, {bench.world.size} rank(s), medians of "
        f"{len(seconds['auto'])}",
        "rank", "prompt tokens", f"{ops['auto'].implementation('decode_attention')} ops", "reference ops", "ratio",
        "in the cache", "in the cache, reference", "ratio",
    )  # fmt: skip
    mine = [statistics.median(times[name]) * 1e3 for times in (seconds, in_cache) for name in ops]
    for r, (tokens, *figures) in enumerate(bench.gather((ids.shape[1], *mine))):
        cells = [f"{tokens:,}"]
        for fast, slow in (figures[:2], figures[2:]):
            cells += [f"{fast:.1f}", f"{slow:.1f}", f"{slow / fast:.2f}"]
        table.add_row(str(r), *cells)
    bench.console.print(table)


SETTINGS: dict[str, dict[str, Any]] = {
    "exact, none": {},
    "exact, int8": {"codec": "int8"},
    "exact, int4": {"codec": "int4"},
    "quest 50 %, none": {"lookup": {"name": "quest", "budget": 0.5}},
}


def needles(args: argparse.Namespace) -> None:
    """Needles found of 18, and allocated bytes, for each codec and lookup."""
    import torch

    import pikv_ds
    from benchmarks.needle_cases import found, needle_cases

    bench = Bench(args)
    rank, size = bench.world.rank, bench.world.size
    cases = needle_cases(bench.tokenizer)
    mine = cases[rank::size]
    most = -(-len(cases) // size)
    table = make_table(
        f"{len(cases)} needle cases, {bench.dtype}, {size} rank(s), page size {args.page_size}",
        "lookup, codec", "found", "same number", "pages / bf16", "with tails", "summaries", "pages visited",
    )  # fmt: skip
    engine = bench.engine(page_size=args.page_size)
    numbers: dict[str, list[str | None]] = {}
    for name, pikv in SETTINGS.items():
        pikv_ds.detach(engine)
        pikv_ds.attach(engine, {"page_size": args.page_size, **pikv})
        store = pikv_ds.api.attachment_of(engine).store
        token_bytes = store.shape.token_bytes * 2 / store.shape.dtype.itemsize  # in bf16, all layers
        totals: Counter[str] = Counter()
        texts = []
        for i in range(most):
            rows = [mine[i].input_ids] if i < len(mine) else []
            ids = torch.tensor(rows, dtype=torch.long, device=launch_env.device()).view(len(rows), -1)
            store.forget_peaks()
            with torch.inference_mode():
                out = engine.module.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False
                )
            figures = pikv_ds.stats(engine)
            for r in figures["per_rank"]:
                totals["pool"] += r["held_pool_bytes"]
                totals["all"] += r["held_kv_bytes"]
                totals["summaries"] += r["peak_summary_bytes"]
                totals["paged"] += r["peak_pages"] * args.page_size // store.shape.num_layers
                totals["tokens"] += r["peak_own_tokens"]
            if rows:
                texts.append(bench.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
            bench.progress(f"{name}: {min((i + 1) * size, len(cases))} of {len(cases)} cases")
        numbers[name] = [m.group() if (m := re.search(r"\d+", t.replace(",", ""))) else None for t in texts]
        hits = sum(found(t, c.answer) for t, c in zip(texts, mine, strict=True))
        same = sum(a == b for a, b in zip(numbers[name], numbers["exact, none"], strict=True))
        counted = bench.gather((hits, same))
        table.add_row(
            name, str(sum(h for h, _ in counted)), str(sum(s for _, s in counted)),
            f"{totals['pool'] / (totals['paged'] * token_bytes):.3f}",
            f"{totals['all'] / (totals['tokens'] * token_bytes):.3f}",
            f"{totals['summaries'] / (totals['tokens'] * token_bytes):.3f}", f"{figures['visited_share']:.0%}",
        )  # fmt: skip
    bench.console.print(table)


def rotation(args: argparse.Namespace) -> None:
    """Next tokens that stay the same with codecs, as they are and rotated, where keys have outlier channels.

    Two pairs of channels of every KV head that RoPE turns together are made larger and the query's smaller by the
    same factor, so the model stays what it is. The first two thirds of a text are sealed, the rest is read over them.
    """
    import logging

    import torch

    import pikv_ds

    bench = Bench(args)
    engine = bench.engine(page_size=args.page_size)
    pikv_ds.detach(engine)
    model, texts = engine.module, []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pikv_ds").addHandler(handler)
    names = ("int4", "int2")
    columns = [f"{name}{rotated}" for name in names for rotated in ("", ", rotated")]
    title = f"next tokens as without a codec, {args.tokens} tokens, page size {args.page_size}"
    table = make_table(title, "outlier channels", *columns, "warns")
    ids = bench.prompt(args.tokens, "moby_dick")
    sealed = ids.shape[1] * 2 // 3
    for factor in (1, 2, 4, 8, 16, 32, 64):
        if factor > 1:
            enlarge_channels(model, 2)
        with torch.inference_mode():
            want = model(ids).logits[:, sealed:].argmax(-1)
        row, warned = [], []
        for codec in ({"name": name, "rotate": rotate} for name in names for rotate in (False, True)):
            texts.clear()
            pikv_ds.attach(engine, {"page_size": args.page_size, "codec": codec})
            cache = pikv_ds.new_cache(engine)
            with torch.inference_mode():
                model(ids[:, :sealed], past_key_values=cache)
                got = model(ids[:, sealed:], past_key_values=cache).logits.argmax(-1)
            cache.release()
            pikv_ds.detach(engine)
            row.append(f"{(got == want).float().mean().item():.2f}")
            warned.append(any("outlier" in text for text in texts))
        table.add_row(f"× {factor}", *row, "yes" if any(warned) else "no")
        bench.progress(f"outlier channels × {factor}")
    bench.console.print(table)


def enlarge_channels(model: Any, factor: float) -> None:
    """Multiplies two pairs of key channels of every KV head, others in each layer, and divides the queries' by it."""
    import torch

    head_dim, half = model.config.head_dim, model.config.head_dim // 2
    for number, layer in enumerate(model.model.layers):
        pairs = torch.randperm(half, generator=torch.Generator().manual_seed(number))[:2]
        scale = torch.ones(head_dim)
        scale[pairs] = scale[pairs + half] = factor
        attention = layer.self_attn
        with torch.no_grad():
            for weight, by in ((attention.k_proj.weight, scale), (attention.q_proj.weight, 1 / scale)):
                weight.unflatten(0, (-1, head_dim)).mul_(by[:, None].to(weight))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog=f"examples:\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = {f.__name__: f for f in (parity, bound, wire, memory, speed, needles, rotation)}
    parser.add_argument("what", choices=commands)
    parser.add_argument("--model", metavar="DIR", help="Hugging Face checkpoint (default: the reference model)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, default=6100, help="prompt length (default: 6100)")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--chunk", type=int, help="pikv.prefill_chunk_tokens")
    parser.add_argument("--codec", default="none", help="pikv.codec of `speed` (default: none)")
    parser.add_argument("--page-size", type=int, default=32)
    parser.add_argument("--expert", type=int, default=0, help="the hot expert of `bound`")
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    commands[args.what](args)
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
