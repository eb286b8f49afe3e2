"""The CUDA kernels as ops on CPU tensors: csrc/cuda compiled by g++ against `emulator.h`, called through ctypes."""

from __future__ import annotations

import ctypes
import subprocess
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_bool, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from pikv_ds.layout import PageLayout
from pikv_ds.ops.lists import PageLists
from pikv_ds.ops.state import UtilityState
from pikv_ds.ops.summaries import SubPages
from pikv_ds.slabs import Slabs

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _struct(name: str, **fields: type) -> type[ctypes.Structure]:
    """A struct of csrc/launch.h; the fields are those, in order."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


def _names(kind: type, names: str) -> dict[str, type]:
    return dict.fromkeys(names.split(), kind)


Layout = _struct(
    "Layout",
    **_names(c_int32, "num_kv_heads head_dim page_size element latent_dim key_bits value_bits byte_scales clip"),
)
SlabRows = _struct("SlabRows", pointers=c_void_p, slab_rows=c_int64, row_bytes=c_int64)
SealPages = _struct(
    "SealPages",
    **_names(c_void_p, "keys values out bounds flags"),
    layout=Layout,
    dtype=c_int32,
    **_names(c_int64, "num_pages pages_per_flag"),
    key_strides=c_int64 * 3,
    value_strides=c_int64 * 3,
    **_names(c_int64, "out_stride bounds_stride"),
)
GatherPages = _struct("GatherPages", slabs=SlabRows, slots=c_void_p, out=c_void_p, num_pages=c_int64)
ScatterPages = _struct(
    "ScatterPages", slabs=SlabRows, slots=c_void_p, pages=c_void_p, **_names(c_int64, "num_pages stride")
)
Lists = _struct(
    "Lists",
    **_names(c_void_p, "slots counts directory directories rows"),
    width=c_int64,
    **_names(c_int32, "num_lists first step heads"),
    per_head=c_bool,
)
DecodeAttention = _struct(
    "DecodeAttention",
    query=c_void_p,
    slabs=SlabRows,
    lists=Lists,
    **_names(c_void_p, "out lse page_lse scratch"),
    layout=Layout,
    dtype=c_int32,
    scale=c_float,
    **_names(c_int64, "num_rows num_table_rows num_heads num_splits out_stride lse_stride"),
)
PrefillAttention = _struct(
    "PrefillAttention",
    query=c_void_p,
    slabs=SlabRows,
    **_names(c_void_p, "slots out lse"),
    layout=Layout,
    dtype=c_int32,
    scale=c_float,
    **_names(c_int64, "num_queries num_heads num_pages"),
)
TailAttention = _struct(
    "TailAttention",
    **_names(c_void_p, "query keys values indices lengths out lse"),
    dtype=c_int32,
    scale=c_float,
    **_names(c_int64, "num_rows num_heads num_kv_heads page_size head_dim value_dim out_stride lse_stride"),
)
AppendTokens = _struct(
    "AppendTokens",
    **_names(c_void_p, "keys values tail_keys tail_values places flags"),
    dtype=c_int32,
    num_tokens=c_int64,
    key_strides=c_int64 * 2,
    value_strides=c_int64 * 2,
    **_names(c_int64, "num_kv_heads page_size head_dim value_dim"),
)
AppendExperts = _struct(
    "AppendExperts",
    **_names(c_void_p, "experts tail_experts places"),
    **_names(c_int64, "expert_bytes num_tokens page_size top_k"),
)
MergePartials = _struct(
    "MergePartials",
    **_names(c_void_p, "outs lses out lse"),
    dtype=c_int32,
    **_names(c_int64, "num_partials num_rows num_heads head_dim"),
    outs_strides=c_int64 * 2,
    lses_strides=c_int64 * 2,
    **_names(c_int64, "out_stride lse_stride"),
)
PageScores = _struct(
    "PageScores",
    query=c_void_p,
    summaries=SlabRows,
    **_names(c_void_p, "table counts out"),
    **_names(c_int32, "dtype bounds_dtype"),
    **_names(c_int64, "num_rows num_heads num_kv_heads head_dim table_width"),
)
SubpageScores = _struct(
    "SubpageScores",
    query=c_void_p,
    summaries=SlabRows,
    **_names(c_void_p, "table counts out"),
    **_names(c_int32, "dtype bits"),
    scale=c_float,
    **_names(c_int64, "num_rows num_heads num_kv_heads head_dim num_subpages table_width"),
)
SelectPages = _struct(
    "SelectPages",
    **_names(c_void_p, "table counts scores pinned budget out"),
    **_names(c_int64, "num_rows num_kv_heads table_width"),
)
Utility = _struct(
    "Utility", **_names(c_void_p, "mass last_step visits"), num_slots=c_int64, step=c_int32, decay=c_float
)
UpdateUtility = _struct("UpdateUtility", state=Utility, slots=c_void_p, new_mass=c_void_p, num_pages=c_int64)
ChooseVictims = _struct(
    "ChooseVictims",
    state=Utility,
    evictable=c_void_p,
    weights=c_float * 3,
    out=c_void_p,
    num_victims=c_int64,
    scratch=c_void_p,
)


def build(folder: Path) -> Path:
    """Compiles the kernels into a shared library, two files at a time; -O2 would compile for longer than it saves."""
    here = ROOT / "tests/cuda_emulator"
    sources = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), *sorted(here.glob("*.cpp"))]
    sanitizer = ["-fsanitize=alignment", "-fno-sanitize-recover=alignment"]
    flags = ["-x", "c++", "-std=c++17", "-Og", "-fPIC", "-DPIKV_EMULATOR", "-DPIKV_WITH_CUDA", "-w", *sanitizer]

    def compile_one(source: Path) -> Path:
        out = folder / f"{source.stem}.o"
        subprocess.run(["g++", *flags, f"-I{here}", "-c", str(source), "-o", str(out)], check=True)
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "pikv_emulated.so"
    subprocess.run(["g++", "-shared", *sanitizer, *map(str, objects), "-o", str(library)], check=True)
    return library


class EmulatedOps:
    """The signatures of `pikv_ds.ops.reference`, for CPU tensors.

    Args:
        library: what `build` returned.
        num_splits: pieces of the sequence in `decode_attention`.
    """

    def __init__(self, library: Path, num_splits: int = 1) -> None:
        self.lib = ctypes.CDLL(str(library))
        self.lib.DecodeScratchFloats.restype = self.lib.ChooseVictimsScratchBytes.restype = c_int64
        self.num_splits = num_splits

    def seal_pages(
        self,
        keys: Tensor,
        values: Tensor | None,
        layout: PageLayout,
        out: Tensor,
        bounds: Tensor | None,
        flags: Tensor,
    ) -> None:
        params = SealPages(
            keys.data_ptr(),
            None if values is None else values.data_ptr(),
            out.data_ptr(),
            None if bounds is None else bounds.data_ptr(),
            flags.data_ptr(),
            _layout(layout, layout.seal_code),
            DTYPES.index(keys.dtype),
            len(keys),
            max(1, len(keys) // len(flags)),
            (c_int64 * 3)(*keys.stride()[:3]),
            (c_int64 * 3)(*([] if values is None else values.stride()[:3])),
            out.stride(0),
            0 if bounds is None else bounds.stride(0),
        )
        self.lib.SealPages(ctypes.byref(params))

    def gather_pages(self, slabs: Slabs, slots: Tensor, out: Tensor) -> None:
        self.lib.GatherPages(ctypes.byref(GatherPages(_slabs(slabs), slots.data_ptr(), out.data_ptr(), len(slots))))

    def scatter_pages(self, slabs: Slabs, slots: Tensor, pages: Tensor) -> None:
        params = ScatterPages(_slabs(slabs), slots.data_ptr(), pages.data_ptr(), len(slots), pages.stride(0))
        self.lib.ScatterPages(ctypes.byref(params))

    def decode_attention(
        self,
        query: Tensor,
        slabs: Slabs,
        table: Tensor | PageLists,
        counts: Tensor | None,
        layout: PageLayout,
        scale: float,
        out: Tensor | None,
        lse: Tensor | None,
        page_lse: Tensor | None = None,
    ) -> None:
        params = DecodeAttention(
            query.data_ptr(),
            _slabs(slabs),
            _lists(table, counts),
            None if out is None else out.data_ptr(),
            None if lse is None else lse.data_ptr(),
            None if page_lse is None else page_lse.data_ptr(),
            None,
            _layout(layout),
            DTYPES.index(query.dtype),
            scale,
            len(query),
            len(table),
            query.shape[1],
            self.num_splits,
            0 if out is None else out.stride(0),
            0 if lse is None else lse.stride(0),
        )
        scratch = torch.full((self.lib.DecodeScratchFloats(ctypes.byref(params)),), torch.nan)
        params.scratch = scratch.data_ptr()
        self.lib.DecodeAttention(ctypes.byref(params))

    def key_scores(
        self,
        query: Tensor,
        slabs: Slabs,
        table: Tensor,
        counts: Tensor,
        layout: PageLayout,
        scale: float,
        out: Tensor,
    ) -> None:
        self.decode_attention(query, slabs, table, counts, layout, scale, None, None, out)

    def prefill_attention(
        self, query: Tensor, slabs: Slabs, slots: Tensor, layout: PageLayout, scale: float, out: Tensor, lse: Tensor
    ) -> None:
        params = PrefillAttention(
            query.data_ptr(),
            _slabs(slabs),
            slots.data_ptr(),
            out.data_ptr(),
            lse.data_ptr(),
            _layout(layout),
            DTYPES.index(query.dtype),
            scale,
            len(query),
            query.shape[1],
            len(slots),
        )
        self.lib.PrefillAttention(ctypes.byref(params))

    def tail_attention(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        lengths: Tensor,
        scale: float,
        out: Tensor,
        lse: Tensor,
        indices: Tensor | None = None,
    ) -> None:
        _, kv_heads, page_size, head_dim = keys.shape
        params = TailAttention(
            *(t.data_ptr() for t in (query, keys, values)),
            None if indices is None else indices.data_ptr(),
            *(t.data_ptr() for t in (lengths, out, lse)),
            DTYPES.index(query.dtype),
            scale,
            *query.shape[:2],
            kv_heads,
            page_size,
            head_dim,
            out.shape[2],
            out.stride(0),
            lse.stride(0),
        )
        self.lib.TailAttention(ctypes.byref(params))

    def append_tokens(
        self,
        keys: Tensor,
        values: Tensor | None,
        places: Tensor,
        tail_keys: Tensor,
        tail_values: Tensor | None,
        flags: Tensor,
    ) -> None:
        params = AppendTokens(
            *(None if t is None else t.data_ptr() for t in (keys, values, tail_keys, tail_values, places, flags)),
            DTYPES.index(keys.dtype),
            places.shape[1],
            (c_int64 * 2)(*keys.stride()[:2]),
            (c_int64 * 2)(*([] if values is None else values.stride()[:2])),
            *tail_keys.shape[1:],
            0 if values is None else values.shape[2],
        )
        self.lib.AppendTokens(ctypes.byref(params))

    def append_experts(self, experts: Tensor, places: Tensor, tail_experts: Tensor) -> None:
        tensors = (t.data_ptr() for t in (experts, tail_experts, places))
        params = AppendExperts(*tensors, experts.element_size(), places.shape[1], *tail_experts.shape[1:])
        self.lib.AppendExperts(ctypes.byref(params))

    def merge_partials(self, outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor | None) -> None:
        heads = outs.shape[2] if outs.dim() == 4 else 1
        params = MergePartials(
            *(None if t is None else t.data_ptr() for t in (outs, lses, out, lse)),
            DTYPES.index(out.dtype),
            *outs.shape[:2],
            heads,
            outs.shape[-1],
            (c_int64 * 2)(*outs.stride()[:2]),
            (c_int64 * 2)(*lses.stride()[:2]),
            out.stride(0),
            0 if lse is None else lse.stride(0),
        )
        self.lib.MergePartials(ctypes.byref(params))

    def page_scores(
        self, query: Tensor, summary_slabs: Slabs, table: Tensor, counts: Tensor, layout: PageLayout, out: Tensor
    ) -> None:
        params = PageScores(
            query.data_ptr(),
            _slabs(summary_slabs),
            table.data_ptr(),
            counts.data_ptr(),
            out.data_ptr(),
            DTYPES.index(query.dtype),
            DTYPES.index(layout.dtype),
            len(query),
            query.shape[1],
            layout.num_kv_heads,
            layout.head_dim,
            table.shape[1],
        )
        self.lib.PageScores(ctypes.byref(params))

    def subpage_scores(
        self,
        query: Tensor,
        summary_slabs: Slabs,
        table: Tensor,
        counts: Tensor,
        layout: PageLayout,
        summary: SubPages,
        scale: float,
        out: Tensor,
    ) -> None:
        params = SubpageScores(
            query.data_ptr(),
            _slabs(summary_slabs),
            table.data_ptr(),
            counts.data_ptr(),
            out.data_ptr(),
            DTYPES.index(query.dtype),
            summary.bits,
            scale,
            len(query),
            query.shape[1],
            layout.num_kv_heads,
            layout.head_dim,
            summary.count(layout),
            table.shape[1],
        )
        self.lib.SubpageScores(ctypes.byref(params))

    def select_pages(
        self, table: Tensor, counts: Tensor, scores: Tensor, pinned: Tensor, budget: Tensor, out: Tensor
    ) -> None:
        tensors = [t.data_ptr() for t in (table, counts, scores, pinned, budget, out)]
        self.lib.SelectPages(ctypes.byref(SelectPages(*tensors, *scores.shape)))

    def update_utility(self, slots: Tensor, mass: Tensor, step: int, decay: float, state: UtilityState) -> None:
        params = UpdateUtility(_utility(state, step, decay), slots.data_ptr(), mass.data_ptr(), len(slots))
        self.lib.UpdateUtility(ctypes.byref(params))

    def choose_victims(
        self,
        state: UtilityState,
        evictable: Tensor,
        step: int,
        decay: float,
        weights: tuple[float, float, float],
        out: Tensor,
    ) -> None:
        params = ChooseVictims(
            _utility(state, step, decay), evictable.data_ptr(), (c_float * 3)(*weights), out.data_ptr(), len(out)
        )
        scratch = torch.empty(self.lib.ChooseVictimsScratchBytes(ctypes.byref(params)), dtype=torch.uint8)
        params.scratch = scratch.data_ptr()
        self.lib.ChooseVictims(ctypes.byref(params))


def _layout(layout: PageLayout, code: int | None = None) -> ctypes.Structure:
    """As `Args.LayoutOf` of csrc/bindings/checks.h makes it."""
    code = layout.code if code is None else code
    bits = code >> 8 & 0xFF, code >> 16 & 0xFF, code >> 24 & 1, code >> 25 & 1
    sizes = layout.num_kv_heads, layout.head_dim, layout.page_size
    return Layout(*sizes, code & 0xFF, layout.latent_dim or 0, *bits)


def _lists(table: Tensor | PageLists, counts: Tensor | None) -> ctypes.Structure:
    if isinstance(table, PageLists):
        tensors = table.slots, table.counts, table.directory, table.directories, table.rows
        which = table.counts.shape[1], table.first, table.step, table.heads
        return Lists(*(t.data_ptr() for t in tensors), table.width, *which, False)
    assert counts is not None
    return Lists(table.data_ptr(), counts.data_ptr(), None, None, None, table.shape[-1], 0, 0, 0, 0, table.dim() == 3)


def _slabs(slabs: Slabs) -> ctypes.Structure:
    return SlabRows(slabs.pointers.data_ptr(), slabs.slab_rows, slabs.row_bytes)


def _utility(state: UtilityState, step: int, decay: float) -> ctypes.Structure:
    return Utility(
        state.mass.data_ptr(), state.last_step.data_ptr(), state.visits.data_ptr(), len(state.mass), step, decay
    )
