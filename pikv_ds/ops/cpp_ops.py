"""The compiled ops: arguments of `Ops` to those of ``torch.ops.pikv_ds`` (csrc/bindings)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

import pikv_ds._C  # noqa: F401  (loading it registers the ops)
from pikv_ds.layout import PageLayout
from pikv_ds.ops import OPS
from pikv_ds.ops.lists import PageLists
from pikv_ds.ops.state import UtilityState
from pikv_ds.ops.summaries import SubPages
from pikv_ds.slabs import Slabs

_C = torch.ops.pikv_ds


def _fake(*args: object, **kwargs: object) -> None:
    """The fake form of every op: they write into tensors that the caller owns, and make none."""


for _op in (*OPS, "decode_lists"):
    if hasattr(_C, _op):
        torch.library.register_fake(f"pikv_ds::{_op}", _fake)


@cache
def supported(device_type: str) -> frozenset[str]:
    """Ops that have kernels for a device."""
    has_kernel, key = torch._C._dispatch_has_kernel_for_dispatch_key, {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return frozenset(op for op in OPS if key and hasattr(_C, op) and has_kernel(f"pikv_ds::{op}", key))


def seal_pages(
    keys: Tensor, values: Tensor | None, layout: PageLayout, out: Tensor, bounds: Tensor | None, flags: Tensor
) -> None:
    _C.seal_pages(keys, values, layout.seal_code, *_layout(layout)[1:], out, bounds, flags)


def gather_pages(slabs: Slabs, slots: Tensor, out: Tensor) -> None:
    _C.gather_pages(*_slabs(slabs), slots, out)


def scatter_pages(slabs: Slabs, slots: Tensor, pages: Tensor) -> None:
    _C.scatter_pages(*_slabs(slabs), slots, pages)


def place_pages(
    preference: Tensor, groups: Tensor, limits: Tensor, source: int, loads: Tensor, free: Tensor, out: Tensor
) -> None:
    _C.place_pages(preference, groups, limits, source, loads, free, out)


def decode_attention(
    query: Tensor,
    slabs: Slabs,
    table: Tensor | PageLists,
    counts: Tensor | None,
    layout: PageLayout,
    scale: float,
    out: Tensor,
    lse: Tensor,
    page_lse: Tensor | None = None,
) -> None:
    width = table.width if isinstance(table, PageLists) else table.shape[-1]
    num_splits, scratch = _num_splits(len(table), width, query, layout), None
    if query.device.type == "cuda":
        floats = _C.decode_scratch_floats(*query.shape[:2], layout.value_dim, num_splits)
        scratch = torch.empty(floats, dtype=torch.float32, device=query.device)
    if isinstance(table, PageLists):
        where = table.slots, table.counts, table.directory, table.directories, table.rows
        which = table.width, table.first, table.step, table.heads
        _C.decode_lists(query, *_slabs(slabs), *where, *which, *_layout(layout), scale, out, lse, num_splits, scratch)
        return
    _C.decode_attention(
        query, *_slabs(slabs), table, counts, *_layout(layout), scale, out, lse, page_lse, num_splits, scratch
    )


def key_scores(
    query: Tensor, slabs: Slabs, table: Tensor, counts: Tensor, layout: PageLayout, scale: float, out: Tensor
) -> None:
    num_splits = _num_splits(len(table), table.shape[-1], query, layout)
    _C.key_scores(query, *_slabs(slabs), table, counts, *_layout(layout), scale, out, num_splits)


def prefill_attention(
    query: Tensor, slabs: Slabs, slots: Tensor, layout: PageLayout, scale: float, out: Tensor, lse: Tensor
) -> None:
    _C.prefill_attention(query, *_slabs(slabs), slots, *_layout(layout), scale, out, lse)


def context_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    first_query: int | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    _C.context_attention(query, keys, values, scale, first_query, out, lse)


def tail_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    indices: Tensor | None = None,
) -> None:
    _C.tail_attention(query, keys, values, lengths, scale, out, lse, indices)


def append_tokens(
    keys: Tensor, values: Tensor | None, places: Tensor, tail_keys: Tensor, tail_values: Tensor | None, flags: Tensor
) -> None:
    _C.append_tokens(keys, values, places, tail_keys, tail_values, flags)


def append_experts(experts: Tensor, places: Tensor, tail_experts: Tensor) -> None:
    _C.append_experts(experts, places, tail_experts)


def merge_partials(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor | None) -> None:
    _C.merge_partials(outs, lses, out, lse)


def page_scores(
    query: Tensor, summary_slabs: Slabs, table: Tensor, counts: Tensor, layout: PageLayout, out: Tensor
) -> None:
    _C.page_scores(query, *_slabs(summary_slabs), table, counts, layout.dtype, layout.num_kv_heads, out)


def subpage_scores(
    query: Tensor,
    summary_slabs: Slabs,
    table: Tensor,
    counts: Tensor,
    layout: PageLayout,
    summary: SubPages,
    scale: float,
    out: Tensor,
) -> None:
    shape = layout.num_kv_heads, summary.count(layout), summary.bits
    _C.subpage_scores(query, *_slabs(summary_slabs), table, counts, *shape, scale, out)


def select_pages(table: Tensor, counts: Tensor, scores: Tensor, pinned: Tensor, budget: Tensor, out: Tensor) -> None:
    _C.select_pages(table, counts, scores, pinned, budget, out)


def update_utility(slots: Tensor, mass: Tensor, step: int, decay: float, state: UtilityState) -> None:
    _C.update_utility(slots, mass, step, decay, state.mass, state.last_step, state.visits)


def choose_victims(
    state: UtilityState, evictable: Tensor, step: int, decay: float, weights: tuple[float, float, float], out: Tensor
) -> None:
    scratch = None
    if out.device.type == "cuda":
        num_bytes = _C.choose_victims_scratch_bytes(len(evictable), len(out))
        scratch = torch.empty(num_bytes, dtype=torch.uint8, device=out.device)
    _C.choose_victims(state.mass, state.last_step, state.visits, evictable, step, decay, *weights, out, scratch)


def _slabs(slabs: Slabs) -> tuple[Tensor, int, int]:
    return slabs.pointers, slabs.slab_rows, slabs.row_bytes


def _layout(layout: PageLayout) -> tuple[int, int, int, int]:
    return layout.code, layout.num_kv_heads, layout.page_size, layout.latent_dim or 0


def _num_splits(num_lists: int, width: int, query: Tensor, layout: PageLayout) -> int:
    """Pieces to attend each sequence of a KV head in, so that a GPU's processors all have two to work on.

    It follows from shapes alone: what a table holds is unknown here, and a captured graph replays it.
    """
    if query.device.type != "cuda":
        return 1
    wanted = -(-2 * _num_processors(query.device) // max(1, num_lists * layout.num_kv_heads))
    return max(1, min(wanted, width // 4))  # a split of fewer pages costs more than it saves


@cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
