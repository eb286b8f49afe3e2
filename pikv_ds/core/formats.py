"""`PageFormat`: a codec made for a model. Where a page's bytes lie, which kernels read them, and in which bases.

A cache has one format, or several: where layers, heads or experts have codecs of their own, or cold pages are demoted
to a smaller one. Pages of several formats are attended to one format after the other, and the partials are merged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pikv_ds.config import PiKVConfig
from pikv_ds.core.pool import PageSize
from pikv_ds.core.shape import ModelShape
from pikv_ds.layout import PageLayout, SealFlag
from pikv_ds.ops import Ops
from pikv_ds.ops.projections import MOST_UNEVEN, Projections, unevenness
from pikv_ds.ops.reference import unseal_pages
from pikv_ds.ops.summaries import KeyBounds, SubPages, Summary
from pikv_ds.policies.codecs import Codec

FEW_TOKENS = 128
"""Fewer keys do not show what the channels of a layer are like."""


@dataclass(frozen=True)
class PageFormat:
    """How pages of one codec are written and read."""

    codec: Codec
    layout: PageLayout
    ops: Ops
    bases: list[Projections]
    """Per layer, of what pages store; none where they store keys and values as they are."""
    summary: Summary | None

    @property
    def size(self) -> PageSize:
        """Bytes of a page, and of its summary."""
        return PageSize(self.layout.page_bytes, 0 if self.summary is None else self.summary.num_bytes(self.layout))

    def seal(self, layer: int, head: int, keys: Tensor, values: Tensor | None, flags: Tensor) -> Tensor:
        """Encodes full pages.

        Args:
            layer, head: whose pages they are, and the first KV head that they hold. Pages of several layers may go
                together where there are no bases.
            keys, values: ``[N, K, S, D]``; no values where they are channels of the keys.
            flags: int32 ``[F]``, of equally many pages each, to which a `SealFlag` is added; one with bases.

        Returns:
            uint8 ``[N, page bytes + summary bytes]``.
        """
        split = self.layout.page_bytes
        out = torch.empty(len(keys), sum(self.size), dtype=torch.uint8, device=keys.device)
        of_layer, finite = flags, None
        if self.bases:
            assert values is not None
            if self.codec.rotate and self.layout.scale_rows == 2 and keys.shape[0] * keys.shape[2] >= FEW_TOKENS:
                of_layer |= SealFlag.OUTLIERS * (unevenness(keys) > MOST_UNEVEN)
            finite, flags = keys.isfinite().all() & values.isfinite().all(), torch.zeros_like(flags)
            keys, values = self.bases[layer].heads(head, keys.shape[1]).encode(keys, values)
        bounds = out[:, split:] if isinstance(self.summary, KeyBounds) else None
        self.ops.seal_pages(keys, values, self.layout, out[:, :split], bounds, flags)
        if isinstance(self.summary, SubPages):
            out[:, split:] = self.summary.encode(keys, self.layout, flags)
        if finite is not None:  # coefficients of finite keys and values may be beyond the model's type
            overflowed = finite & (flags & SealFlag.NON_FINITE > 0)
            of_layer |= torch.where(overflowed, SealFlag.BEYOND_RANGE, flags)
        return out

    def unseal(self, layer: int, head: int, pages: Tensor) -> tuple[Tensor, Tensor | None]:
        """Keys and values ``[N, K, S, D]``, in the model's type, of pages uint8 ``[N, page bytes]``."""
        keys, values = unseal_pages(pages, self.layout)
        if self.bases:
            keys, values = self.bases[layer].heads(head, keys.shape[1]).decode(keys, values)
        dtype = self.layout.dtype
        largest = torch.finfo(dtype).max  # which the last step of a code may exceed
        keys, values = (x.clamp(-largest, largest).to(dtype) for x in (keys, values))
        return keys, None if self.layout.latent_dim is not None else values

    def query(self, layer: int, query: Tensor) -> Tensor:
        """Queries ``[n, H, D]`` as they meet pages, ``[n, H, r]``."""
        return self.bases[layer].query(query).contiguous() if self.bases else query

    def output(self, layer: int, out: Tensor) -> Tensor:
        """What they have found there, as outputs ``[n, H, V]``."""
        return self.bases[layer].output(out).contiguous() if self.bases else out


def describe_flags(flags: SealFlag, where: str, formats: list[PageFormat]) -> str:
    """What is wrong with the keys or values of a layer, and what to do about it.

    Args:
        where: the layer, in words.
    """
    if SealFlag.NON_FINITE in flags:
        return f"NaN or infinity in the keys or values of {where}; check the model's weights and dtype"
    if SealFlag.BEYOND_RANGE not in flags:
        return (
            f"keys of {where} are finite, but beyond what the summaries of pikv.lookup hold, in float16; "
            'use the lookup "exact", or "quest"'
        )
    lossy = [f for f in formats if f.bases or any(e not in (None, "none") for e in (f.codec.name, f.codec.values))]
    holds = ", ".join(f"{f.codec.label} holds {f.codec.reach(f.layout.dtype)}" for f in lossy)
    remedies = ['"none"']
    if not any("fp8" in (f.codec.name, f.codec.values) for f in lossy):
        remedies.insert(0, '"fp8"')
    if any(f.codec.scales == 8 for f in lossy):
        remedies.insert(0, "one with 16-bit scales")
    return (
        f"keys or values of {where} are finite, but beyond what pikv.codec holds ({holds}); "
        f"use {' or '.join(remedies)} there, without rotate or projections"
    )


def num_streams(shape: ModelShape, config: PiKVConfig) -> int:
    """KV heads of a layer with pages of their own; 1: a page holds all heads."""
    budget_per_head = config.retention is not None and config.budget.per_head
    return shape.num_kv_heads if budget_per_head or config.codec.per_head else 1


def make_formats(shape: ModelShape, config: PiKVConfig, backend: str, device: torch.device) -> list[PageFormat]:
    """The formats of a cache: those of the codec policy's codecs, then that of demoted pages, if there is one.

    Raises:
        ValueError: a codec does not fit, or the backend has no kernels for such pages.
    """
    heads = shape.num_kv_heads // num_streams(shape, config)
    formats = []
    for codec in [*config.codec.codecs, *([] if config.demote is None else [config.demote])]:
        bases = codec.bases(shape.num_layers, shape.num_kv_heads, shape.head_dim, device)
        key_rank, value_rank = shape.head_dim, None
        if bases:
            key_rank, value_rank = bases[0].key_read.shape[2], bases[0].value_read.shape[2]
        layout = codec.layout(heads, key_rank, config.page_size, shape.dtype, shape.latent_dim, value_rank)
        formats.append(PageFormat(codec, layout, Ops(backend, device.type, layout), bases, config.lookup.summary))
    return formats
