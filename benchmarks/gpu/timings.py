"""What is timed: decoding at the sizes of serving, apart from the merge of its splits, and what people use instead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.cases import HUGE
from pikv_ds.layout import PageLayout
from pikv_ds.ops import Ops
from pikv_ds.slabs import Slabs
from pikv_ds.tools.bench import timing
from pikv_ds.tools.bench.attention import Setting
from pikv_ds.tools.bench.timing import Contender
from pikv_ds.tools.command_line import Parser, device, whole

SLAB_PAGES = 16
"""Pages per slab, as in a cache."""
DISTINCT_PAGES = 512
"""More are copies of these: what a page holds takes time to make, and does not matter to the one that reads it."""
SLABS_AT_ONCE = 64
FLASHINFER_WORKSPACE = 128 << 20


def timed(contenders: Sequence[Contender], setting: Setting, rounds: int) -> list[dict[str, Any]]:
    """Interleaved medians as rows of a result."""
    timings = timing.measure(contenders, [torch.get_num_threads()], rounds, setting.device)
    return [
        {"contender": t.name, "seconds": t.seconds, "quartiles": t.spread, "bytes": t.num_bytes, "clock": t.clock}
        for t in timings
    ]


def decoding(setting: Setting, codec: str, lengths: Sequence[int], backend: str) -> list[Contender]:
    """`decode_attention` of one token per sequence over pages in random slots, and the merge of its splits by itself.

    Args:
        lengths: pages of each sequence.
    """
    layout, ops = setting.pages(codec, backend)
    total = sum(lengths)
    copies = max(1, math.ceil(setting.working_set / (total * layout.page_bytes)))
    slabs = _pool(setting, layout, ops, copies * total)
    # The first slab has the null page.
    slots = SLAB_PAGES + torch.randperm(copies * total, device=setting.device).int()
    counts = torch.tensor(lengths, dtype=torch.int32, device=setting.device)
    there = torch.arange(max(lengths), device=setting.device) < counts[:, None]
    tables = torch.full((copies, *there.shape), HUGE, dtype=torch.int32, device=setting.device)
    tables[there.expand_as(tables)] = slots
    query, scale = setting.query(len(lengths)), setting.head_dim**-0.5
    out, lse = (torch.empty(x, device=setting.device) for x in (query.shape, query.shape[:2]))

    def run(i: int) -> None:
        ops.decode_attention(query, slabs, tables[i], counts, layout, scale, out, lse)

    decode = Contender(f"pikv {codec}{' (triton)' * (backend == 'triton')}", run, copies, total * layout.page_bytes)
    splits = _num_splits(ops, tables[0], layout)
    return [decode] if splits == 1 else [decode, _merging(ops, out, lse, splits)]


def without_merge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One more row: the time of decoding without that of the merge, whose partials the second-level cache holds in
    both."""
    whole, merge = (next((r for r in rows if r["contender"].startswith(x)), None) for x in ("pikv", "merge"))
    if whole is None or merge is None:
        return rows  # one split: nothing is merged
    rest = whole | {"contender": "of it the pages", "seconds": whole["seconds"] - merge["seconds"]}
    return [*rows, rest]


def _num_splits(ops: Ops, table: Tensor, layout: PageLayout) -> int:
    if ops.implementation("decode_attention") != "cpp":
        return 1  # the reference has none, and Triton's merge cannot be called by itself
    from pikv_ds.ops import cpp_ops

    return 2 if table.device.type == "cpu" else cpp_ops._num_splits(table, layout)  # a dry run merges, too


def _merging(ops: Ops, out: Tensor, lse: Tensor, splits: int) -> Contender:
    """The merge that `decode_attention` ends with, of ``out [R, H, D]`` and ``lse [R, H]``."""
    outs = torch.randn(splits, *out.flatten(0, 1).shape, device=out.device)
    lses = torch.randn(splits, lse.numel(), device=out.device)
    merged, merged_lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])

    def run(_: int) -> None:
        ops.merge_partials(outs, lses, merged, merged_lse)

    return Contender(f"merge of {splits} splits", run, 1, 0)  # no floor: all of it is in the cache


def _pool(setting: Setting, layout: PageLayout, ops: Ops, num_pages: int) -> Slabs:
    """Pages in slots `SLAB_PAGES` and on."""
    distinct, device = min(num_pages, DISTINCT_PAGES), setting.device
    keys, values = (
        setting.tokens(distinct * setting.page_size).unflatten(1, (distinct, -1)).transpose(0, 1) for _ in range(2)
    )
    pages = torch.empty(distinct, layout.page_bytes, dtype=torch.uint8, device=device)
    ops.seal_pages(keys, values, layout, pages, None, torch.zeros(1, dtype=torch.int32, device=device))
    slabs = Slabs(SLAB_PAGES, layout.page_bytes, device)
    step = SLAB_PAGES * SLABS_AT_ONCE
    for first in range(0, SLAB_PAGES + num_pages, step):
        storage = pages[torch.arange(first, first + step, device=device) % distinct]
        for slab in storage.split(SLAB_PAGES):
            slabs.put(len(slabs.tensors), slab)
    return slabs


class Plain:
    """Keys and values as other libraries store them, in bfloat16: ``[copies, 2, B, K, n, D]``."""

    def __init__(self, setting: Setting, context: int, batch: int) -> None:
        self.setting, self.context, self.batch = setting, context, batch
        heads, head_dim = setting.num_kv_heads, setting.head_dim
        self.num_bytes = 2 * batch * heads * context * head_dim * setting.dtype.itemsize
        self.copies = max(1, math.ceil(setting.working_set / self.num_bytes))
        shape = self.copies, 2, batch, heads, context, head_dim
        self.stored = torch.empty(shape, dtype=setting.dtype, device=setting.device).normal_()
        self.query = setting.query(batch)

    def _contender(self, name: str, run: Any) -> Contender:
        return Contender(name, run, self.copies, self.num_bytes)

    def sdpa(self) -> Contender:
        """torch's fused attention; the query heads of a KV head go as its queries, so that no key is repeated."""
        query = self.query.unflatten(1, (self.setting.num_kv_heads, -1))

        def run(i: int) -> Tensor:
            return F.scaled_dot_product_attention(query, *self.stored[i].unbind(0))

        return self._contender("torch SDPA", run)

    def flex(self) -> Contender:
        """torch's flex attention, compiled."""
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        query = self.query[:, :, None]

        def run(i: int) -> Tensor:
            return compiled(query, *self.stored[i].unbind(0), enable_gqa=True)

        return self._contender("flex attention", run)

    def flashinfer(self) -> Contender:
        """FlashInfer's batch decode over pages in random places."""
        import flashinfer

        size, setting = self.setting.page_size, self.setting
        pages = self.stored.view(self.copies, -1, 2, size, setting.num_kv_heads, setting.head_dim)
        per_row = self.context // size
        starts = torch.arange(self.batch + 1, dtype=torch.int32, device=setting.device) * per_row
        full = torch.full((self.batch,), size, dtype=torch.int32, device=setting.device)
        workspace = torch.zeros(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=setting.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        places = torch.randperm(self.batch * per_row, device=setting.device).int()  # in each copy the same
        shape = setting.num_heads, setting.num_kv_heads, setting.head_dim, size
        wrapper.plan(starts, places, full, *shape, q_data_type=setting.dtype, kv_data_type=setting.dtype)
        return self._contender("FlashInfer", lambda i: wrapper.run(self.query, pages[i]))


def main() -> None:
    """A few calls of decode_attention, for tools that look at kernels from outside."""
    parser = Parser(description=main.__doc__)
    parser.add_argument("codecs", nargs="+")
    parser.add_argument("--tokens", nargs="+", type=whole(0), required=True, help="of each sequence")
    parser.add_argument("--device", type=device, default="cuda")
    args = parser.parse_args()
    setting = Setting(device=args.device, working_set=1)
    for codec in args.codecs:
        decode = decoding(setting, codec, [n // setting.page_size for n in args.tokens], "auto")[0]
        for _ in range(3):
            decode.run(0)
    if args.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
