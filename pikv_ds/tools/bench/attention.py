"""Decode attention over paged keys, against torch's and other libraries' attention."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from pikv_ds.errors import UsageError
from pikv_ds.layout import PageLayout
from pikv_ds.ops import Ops
from pikv_ds.ops.summaries import SubPages
from pikv_ds.policies.codecs import ELEMENTS, Codec
from pikv_ds.slabs import Slabs
from pikv_ds.tools.bench.timing import Contender


@dataclass(frozen=True)
class Setting:
    """One layer of a model, one sequence."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 32
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    working_set: int = 1 << 30
    """Bytes that each contender walks through."""

    def tokens(self, num_tokens: int) -> Tensor:
        """Random keys or values ``[K, num_tokens, D]``."""
        return torch.randn(self.num_kv_heads, num_tokens, self.head_dim, device=self.device).to(self.dtype)

    def query(self, num_rows: int = 1) -> Tensor:
        """``[num_rows, H, D]``"""
        return torch.randn(num_rows, self.num_heads, self.head_dim, device=self.device).to(self.dtype)

    def pages(self, codec: str, backend: str) -> tuple[PageLayout, Ops]:
        """The layout of a codec's pages (see `codec_of`), and a backend's ops for them."""
        layout = codec_of(codec).layout(self.num_kv_heads, self.head_dim, self.page_size, self.dtype)
        return layout, Ops(backend, self.device.type, layout)

    def copies(self, num_bytes: int) -> int:
        """Copies of data of ``num_bytes`` that make a working set."""
        return max(2, -(-self.working_set // num_bytes))


def codec_of(text: str) -> Codec:
    """A codec as the command line names it: ``int4``, ``int3/int2`` (keys/values), with ``+clip`` and ``+scales8``.

    Raises:
        ValueError: it names no codec.
    """
    elements, *options = text.split("+")
    keys, _, values = elements.partition("/")
    unknown = [x for x in (keys, values or keys) if x not in ELEMENTS] + [
        x for x in options if x not in ("clip", "scales8")
    ]
    if unknown:
        raise UsageError(
            f"codec {text!r}: {unknown[0]!r} is none of {', '.join(ELEMENTS)}; write it as int4, int3/int2 "
            "(keys/values) or int3+clip+scales8"
        )
    return Codec(keys, values or None, clip="clip" in options, scales=8 if "scales8" in options else 16)


def paged(setting: Setting, context: int, codec: str, backend: str) -> Contender:
    """`decode_attention` over sealed pages."""
    layout, ops = setting.pages(codec, backend)
    data = sealed(setting, context, layout, ops)
    tables = data.tables
    counts = torch.tensor([tables.shape[1]], dtype=torch.int32, device=setting.device)
    query, scale = setting.query(), setting.head_dim**-0.5
    out = torch.empty(1, setting.num_heads, setting.head_dim, device=setting.device)
    lse = torch.empty(1, setting.num_heads, device=setting.device)

    def run(copy: int) -> None:
        ops.decode_attention(query, data.slabs, tables[copy : copy + 1], counts, layout, scale, out, lse)

    name = f"pikv {codec}" + ("" if backend == "auto" else f" ({backend})")
    return Contender(name, run, len(tables), tables.shape[1] * layout.page_bytes, label(context))


@dataclass(frozen=True)
class Sealed:
    """Copies of one sequence's pages in scattered slots."""

    slabs: Slabs
    bounds: Slabs
    """The pages' key bounds, in the same slots."""
    subpages: Slabs
    """Their sub-pages' summaries, where they were asked for."""
    tables: Tensor
    """int32 ``[copies, P]``"""


def sealed(setting: Setting, context: int, layout: PageLayout, ops: Ops, summary: SubPages | None = None) -> Sealed:
    """Seals a sequence of ``context`` tokens and copies its pages until they make a working set."""
    num_pages, size, device = context // setting.page_size, setting.page_size, setting.device
    keys, values = (setting.tokens(num_pages * size).unflatten(1, (num_pages, size)).transpose(0, 1) for _ in range(2))
    pages, bounds = (
        torch.empty(num_pages, n, dtype=torch.uint8, device=device) for n in (layout.page_bytes, layout.bounds_bytes)
    )
    ops.seal_pages(keys, values, layout, pages, bounds, torch.zeros(1, dtype=torch.int32, device=device))
    copies = setting.copies(pages.nbytes)
    encoded = [pages, bounds, bounds[:, :0] if summary is None else summary.encode(keys, layout)]
    stores = [Slabs(num_pages, rows.shape[1], device) for rows in encoded]
    tables = torch.empty(copies, num_pages, dtype=torch.int32, device=device)
    for copy in range(copies + 1):  # slab 0 holds the null slot; the copies lie in slabs of their own
        order = torch.randperm(num_pages, device=device)
        for store, rows in zip(stores, encoded, strict=True):
            store.put(copy, rows[order])
        if copy:
            slots = copy * num_pages + torch.arange(num_pages, dtype=torch.int32, device=device)
            tables[copy - 1, order] = slots
    return Sealed(stores[0], stores[1], stores[2], tables)


def torch_baselines(setting: Setting, context: int) -> list[Contender]:
    """torch's fused attention and the plain grouped matrix products, over contiguous keys."""
    keys, values = setting.tokens(context), setting.tokens(context)
    copies = setting.copies(2 * keys.nbytes)
    stored = [(keys.clone(), values.clone()) for _ in range(copies)]
    query, scale = setting.query(), setting.head_dim**-0.5
    grouped_query = query.view(setting.num_kv_heads, -1, setting.head_dim)

    def sdpa(copy: int) -> Tensor:
        k, v = stored[copy]
        return F.scaled_dot_product_attention(query.transpose(0, 1)[None], k[None], v[None], enable_gqa=True)

    def grouped(copy: int) -> Tensor:
        k, v = stored[copy]
        scores = (grouped_query @ k.transpose(1, 2)) * scale
        return torch.softmax(scores.float(), -1).to(v.dtype) @ v

    num_bytes, group = 2 * keys.nbytes, label(context)
    return [
        Contender("torch grouped matmul", grouped, copies, num_bytes, group),
        Contender("torch SDPA", sdpa, copies, num_bytes, group),
    ]


def flashinfer(setting: Setting, context: int) -> list[Contender]:
    """FlashInfer's decode kernel for one sequence, where it is installed and there is a GPU."""
    if setting.device.type != "cuda" or importlib.util.find_spec("flashinfer") is None:
        return []
    import flashinfer as library

    shape = context, setting.num_kv_heads, setting.head_dim
    keys = torch.randn(shape, device=setting.device).to(setting.dtype)
    copies = setting.copies(2 * keys.nbytes)
    stored = [(keys.clone(), keys.clone()) for _ in range(copies)]
    query = setting.query()[0]

    def run(copy: int) -> Tensor:
        return library.single_decode_with_kv_cache(query, *stored[copy], use_tensor_cores=True)

    return [Contender("FlashInfer", run, copies, 2 * keys.nbytes, label(context))]


def quantized_cache(setting: Setting, context: int) -> list[Contender]:
    """transformers' QuantizedCache in 4 bits, with the attention that follows it."""
    return [_quantized(setting, context, name) for name in _QUANTIZERS if _installed(name)]


_QUANTIZERS = {"quanto": "optimum.quanto", "hqq": "hqq"}


def missing_baselines() -> list[str]:
    """What would be compared with, were it installed."""
    return [
        f"transformers' QuantizedCache ({name}): {module} is not installed"
        for name, module in _QUANTIZERS.items()
        if not _installed(name)
    ]


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(_QUANTIZERS[name]) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def _quantized(setting: Setting, context: int, backend: str) -> Contender:
    from transformers import LlamaConfig, QuantizedCache

    config = LlamaConfig(
        hidden_size=setting.num_heads * setting.head_dim,
        num_attention_heads=setting.num_heads,
        num_key_value_heads=setting.num_kv_heads,
        head_dim=setting.head_dim,
        num_hidden_layers=1,
    )
    cache = QuantizedCache(backend, config, nbits=4, q_group_size=64, residual_length=128)
    cache.update(setting.tokens(context)[None], setting.tokens(context)[None], 0)
    query = setting.query().transpose(0, 1)[None]
    new_key, new_value = setting.tokens(1)[None], setting.tokens(1)[None]

    def run(copy: int) -> Tensor:
        keys, values = cache.update(new_key, new_value, 0)
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    elements = 2 * setting.num_kv_heads * context * setting.head_dim
    return Contender(f"QuantizedCache {backend} int4", run, 1, elements // 2, label(context))


def label(context: int) -> str:
    """A context length as people write it."""
    return f"{context // 1024}k" if context % 1024 == 0 else str(context)
