"""`PageLayout`: where what lies within the bytes of one page.

A page is ``page_size`` consecutive tokens of one sequence at one layer, as ``page_bytes`` bytes
that are stored, sent and logged as they are, the same on every backend. Sections in order, each
starting at a multiple of `ALIGNMENT` bytes (S = page_size, K = KV heads, D = head size):

=============  ======================  =======================================================
section        shape                   type
=============  ======================  =======================================================
keys           ``[K, S, D]``           `element`; integers of few bits packed along D
key scales     ``[scale_rows, K, D]``  per channel of the page: scale, then minimum
values         ``[K, S, D]``           `value_element`, the keys' if not given
value scales   ``[scale_rows, K, S]``  per token: scale, then minimum
=============  ======================  =======================================================

Scales and minima are float16 (`scales` = 16), or bytes (8): ``2^(byte / 8 - 24)`` for a scale, and a minimum in
quarters of its scale's step, as a signed byte.

int4 packs channel ``d`` into the low and channel ``d + D/2`` into the high nibble of byte ``d``;
int2 packs channels ``d``, ``d + D/4``, ``d + D/2``, ``d + 3D/4`` into byte ``d``, lowest bits first:
unpacking is a mask and a shift that give contiguous pieces of a row. int3 is the int2 of the lower bits
of a row, then one bit per channel, packed likewise. ``csrc/layout.h`` computes the same offsets for the
kernels, of layouts that they know (`kernels_know`).

*Latent pages* (multi-head latent attention, DeepSeek-V2, arXiv:2405.04434, section 2.1) have keys and
key scales only: the values of a token are the first `value_dim` channels of its key, so they are
stored once. Integers and fp8 then quantize the values as they do the keys, per channel of the page: an
element of a value is off by at most half a step of its *channel's* range over the page's tokens, where
ordinary values are off by half a step of their *token's* range over its channels. A latent leaves an
RMSNorm, so its tokens are all of one size, and the outliers that it has are channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

import torch
from torch import Tensor

from pikv_ds.errors import UsageError

ALIGNMENT = 16
"""Bytes; each section starts aligned, so that kernels can use 128-bit loads."""

PLAIN = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""Elements stored as they are, without scales."""
BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "fp8": 8, "int8": 8, "int4": 4, "int2": 2, "int3": 3, "int1": 1}
"""Bits per element. A name's place in this list is its number in ``csrc/layout.h``."""


class SealFlag(IntFlag):
    """What is noted where pages are sealed, one int32 per layer on the device."""

    NON_FINITE = 1
    """NaN or infinity among the keys or the values of a KV head."""
    BEYOND_RANGE = 2
    """They are finite, but the codec cannot hold them: a scale or a minimum is beyond its type."""
    BEYOND_SUMMARY = 4
    """The same of the summary that a lookup reads."""
    OUTLIERS = 8
    """Key channels whose outliers a rotation spreads over all others; no error."""


def scale_rows(element: str) -> int:
    """Rows of scales beside data: none, scale alone (fp8), or scale and minimum (integers)."""
    return 1 if element == "fp8" else 2 if element.startswith("int") else 0


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
    element: str
    """Type of a stored element, one of `BITS`."""
    latent_dim: int | None = None
    """Latent pages: how many leading channels of the keys are the values; None: values have a section of their own."""
    value_element: str | None = None
    """Type of a stored element of the values; None: the keys'."""
    scales: int = 16
    """Bits of a scale, and of a minimum: 16 (float16) or 8."""
    clip: bool = False
    """Integers: the range of a group is narrowed to where the squared error is least, instead of from the smallest
    to the largest element."""
    value_rank: int | None = None
    """Channels of a stored value; None: as many as of a key."""

    def __post_init__(self) -> None:
        if self.latent_dim is not None and not 0 < self.latent_dim <= self.head_dim:
            raise UsageError(
                f"latent_dim = {self.latent_dim}: the values are that many of the keys' {self.head_dim} channels; "
                f"use 1 to {self.head_dim}, or None for values of their own"
            )

    @property
    def value_dim(self) -> int:
        """Channels of a stored value, and of an attention output over it."""
        if self.latent_dim is not None:
            return self.latent_dim
        return self.value_rank or self.head_dim

    def values(self, keys: Tensor, values: Tensor | None) -> Tensor:
        """The values ``[..., value_dim]`` that go with keys ``[..., D]``: of latent pages a view of them.

        Args:
            values: None for latent pages.
        """
        if self.latent_dim is not None:
            return keys[..., : self.latent_dim]
        assert values is not None, "only latent pages have their values in their keys"
        return values

    @property
    def code(self) -> int:
        """The element's number in ``csrc/layout.h``; of packed pages with what `Args.LayoutOf` wants beside it."""
        if self.kernels_know:
            return list(BITS).index(self.element)
        bits = BITS[self.element] | BITS[self.value_element or self.element] << 8 | (self.scales == 8) << 16
        return list(BITS).index("int8") | bits << 8

    @property
    def seal_code(self) -> int:
        """`code` for `seal_pages`: where ranges are narrowed, pages are packed ones to it, of whatever bits."""
        if not self.clip:
            return self.code
        bits = BITS[self.element] | BITS[self.value_element or self.element] << 8
        return list(BITS).index("int8") | bits << 8 | (self.scales == 8) << 24 | 1 << 25

    @property
    def kernels_know(self) -> bool:
        """Whether all kernels, compiled and Triton's, can read such pages; else see `packed`."""
        mixed = self.value_element not in (None, self.element) or self.value_rank not in (None, self.head_dim)
        return self.scales == 16 and self.element not in ("int3", "int1") and not mixed

    @property
    def packed(self) -> bool:
        """Whether the compiled kernels write and read such pages: integers, whatever their bits."""
        elements = (self.element, self.value_element or self.element)
        own_rank = self.value_rank not in (None, self.head_dim) or self.latent_dim is not None
        return not self.kernels_know and all(e.startswith("int") for e in elements) and not own_rank

    @property
    def bits(self) -> int:
        """Of an element of the keys."""
        return BITS[self.element]

    @property
    def scale_rows(self) -> int:
        """Rows of scales beside the keys: none, scale alone (fp8), or scale and minimum (integers)."""
        return scale_rows(self.element)

    @property
    def data_bytes(self) -> int:
        """Bytes of the keys of one page."""
        return self.num_kv_heads * self.page_size * self.head_dim * self.bits // 8

    @property
    def value_bytes(self) -> int:
        """Bytes of the values of one page."""
        return self.num_kv_heads * self.page_size * self.value_dim * BITS[self.value_element or self.element] // 8

    @property
    def key_scale_bytes(self) -> int:
        return self.scale_rows * self.num_kv_heads * self.head_dim * self.scales // 8

    @property
    def value_scale_bytes(self) -> int:
        rows = scale_rows(self.value_element or self.element)
        return rows * self.num_kv_heads * self.page_size * self.scales // 8

    @property
    def key_scale_offset(self) -> int:
        return _aligned(self.data_bytes)

    @property
    def value_offset(self) -> int:
        """Where the values begin; latent pages end here."""
        return self.key_scale_offset + _aligned(self.key_scale_bytes)

    @property
    def value_scale_offset(self) -> int:
        return self.value_offset + _aligned(self.value_bytes)

    @property
    def page_bytes(self) -> int:
        """Bytes of a whole page, scales and padding included."""
        if self.latent_dim is not None:
            return self.value_offset
        return self.value_scale_offset + _aligned(self.value_scale_bytes)

    @property
    def bounds_bytes(self) -> int:
        """Bytes of a page's key bounds ``[2, K, D]`` (minima, maxima) in the model's dtype."""
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize
