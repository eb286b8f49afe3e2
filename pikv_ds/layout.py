"""`PageLayout`: where what lies within the bytes of one page.

A page is ``page_size`` consecutive tokens of one sequence at one layer, as ``page_bytes`` bytes
that are stored, sent and logged as they are. Sections in order, each starting at a multiple of
`ALIGNMENT` bytes (S = page_size, K = KV heads, D = head size):

=============  ======================  =======================================================
section        shape                   type
=============  ======================  =======================================================
keys           ``[K, S, D]``           the model's dtype, uint8, or two channels per byte
key scales     ``[2, K, D]``           float16: scale, then minimum, per channel of the page
values         ``[K, S, D]``           as the keys
value scales   ``[2, K, S]``           float16: scale, then minimum, per token
=============  ======================  =======================================================

int4 packs channel ``d`` into the low and channel ``d + D/2`` into the high nibble of byte ``d``:
unpacking is a mask and a shift that give two contiguous half rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ALIGNMENT = 16
"""Bytes; each section starts aligned, so that kernels can use 128-bit loads."""


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class PageLayout:
    """Sizes and offsets of a page's sections, in bytes."""

    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    """Type of the model's keys and values."""
    bits: int | None
    """Bits per element, None for `dtype` itself."""

    @property
    def data_bytes(self) -> int:
        """Bytes of the keys of one page (the values take the same)."""
        elements = self.num_kv_heads * self.page_size * self.head_dim
        return elements * self.dtype.itemsize if self.bits is None else elements * self.bits // 8

    @property
    def key_scale_bytes(self) -> int:
        return 0 if self.bits is None else 2 * self.num_kv_heads * self.head_dim * 2

    @property
    def value_scale_bytes(self) -> int:
        return 0 if self.bits is None else 2 * self.num_kv_heads * self.page_size * 2

    @property
    def key_scale_offset(self) -> int:
        return _aligned(self.data_bytes)

    @property
    def value_offset(self) -> int:
        return self.key_scale_offset + _aligned(self.key_scale_bytes)

    @property
    def value_scale_offset(self) -> int:
        return self.value_offset + _aligned(self.data_bytes)

    @property
    def page_bytes(self) -> int:
        """Bytes of a whole page, scales and padding included."""
        return self.value_scale_offset + _aligned(self.value_scale_bytes)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of one layer outside of a page, uncompressed."""
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize
