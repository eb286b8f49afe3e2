"""Summaries: what a page shows a lookup instead of its keys.

A summary is a part of a page with a format of its own, stored apart from the page's bytes, so that
a lookup reads summaries only. A lookup names the one it needs; where none does, none is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pikv_ds import checks
from pikv_ds.layout import PageLayout, SealFlag


@dataclass(frozen=True)
class KeyBounds:
    """Minimum and maximum of each key channel over the page (Quest, Tang et al. 2024): ``[2, K, D]``.

    `seal_pages` takes them while it encodes the page.
    """

    def num_bytes(self, layout: PageLayout) -> int:
        """Bytes of one page's summary."""
        return layout.bounds_bytes


@dataclass(frozen=True)
class SubPages:
    """Of every few tokens of a page where its keys lie, in the mean and at the most.

    Half of Quest's upper bound and half of the mean key's score rank pages far better than either (both are of
    a *sub-page* of `grain` tokens with channel minima m, maxima M and means u). Their sum needs two vectors only:

        q . (m + M) / 4 + |q| . (M - m) / 4 + q . u / 2  =  q . centre + |q| . spread

    Both are stored as integers of `bits` bits with a float16 scale per sub-page and KV head: for each KV head and
    sub-page D centres and D spreads, packed as int4 is (`pikv_ds.layout`), then all scales ``[2, K, sub-pages]``.
    """

    grain: int = 8
    """Tokens of a sub-page (a page of fewer is one)."""
    bits: int = 4
    """4 or 8."""

    def __post_init__(self) -> None:
        checks.choice(self, "grain", (1, 2, 4, 8, 16, 32), "use 1, 2, 4, 8, 16 or 32 tokens")
        checks.choice(self, "bits", (4, 8), "use 4 or 8", name="summary_bits")

    def count(self, layout: PageLayout) -> int:
        """Sub-pages of a page."""
        return max(1, layout.page_size // self.grain)

    def num_bytes(self, layout: PageLayout) -> int:
        """Bytes of one page's summary."""
        vectors = layout.num_kv_heads * self.count(layout)
        return vectors * (2 * layout.head_dim * self.bits // 8 + 4)

    def encode(self, keys: Tensor, layout: PageLayout, flags: Tensor | None = None) -> Tensor:
        """Summaries of pages of keys ``[N, K, S, D]``: uint8 ``[N, num_bytes]``.

        Args:
            flags: int32 ``[F]``, of equally many pages each (see `seal_pages`); gets `SealFlag.BEYOND_SUMMARY` where a
                scale is beyond float16.
        """
        x = keys.float().unflatten(2, (self.count(layout), -1))  # [N, K, sub-pages, grain, D]
        low, high = x.amin(3), x.amax(3)
        centre, spread = (low + high) / 4 + x.mean(3) / 2, (high - low) / 4
        levels = 2**self.bits - 1
        middle = levels // 2
        centre_scale = _up(centre.abs().amax(-1) / middle)
        spread_scale = _up(spread.amax(-1) / levels)
        scales = torch.stack([centre_scale, spread_scale], dim=1)
        if flags is not None:
            flags |= SealFlag.BEYOND_SUMMARY * ~scales.isfinite().reshape(len(flags), -1).all(1)
        codes = [
            (centre / centre_scale.float().clamp(min=1e-30)[..., None]).round() + middle,
            (spread / spread_scale.float().clamp(min=1e-30)[..., None]).round(),
        ]
        packed = torch.stack([self._pack(c.clamp(0, levels).to(torch.uint8)) for c in codes], dim=1)
        return torch.cat([packed.flatten(1), scales.contiguous().flatten(1).view(torch.uint8)], dim=1)

    def decode(self, summaries: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor]:
        """Centres and spreads, float32 ``[N, K, sub-pages, D]``, of summaries uint8 ``[N, num_bytes]``;
        what a row has more is not looked at."""
        n, k, count, d = len(summaries), layout.num_kv_heads, self.count(layout), layout.head_dim
        split = 2 * k * count * d * self.bits // 8
        codes = self._unpack(summaries[:, :split].reshape(n, 2, k, count, d * self.bits // 8)).float()
        scales = summaries[:, split : self.num_bytes(layout)].contiguous().view(torch.float16)
        scales = scales.float().view(n, 2, k, count, 1)
        middle = (2**self.bits - 1) // 2
        return (codes[:, 0] - middle) * scales[:, 0], codes[:, 1] * scales[:, 1]

    def _pack(self, codes: Tensor) -> Tensor:
        if self.bits == 8:
            return codes
        low, high = codes.chunk(2, dim=-1)
        return low | high << 4

    def _unpack(self, packed: Tensor) -> Tensor:
        return packed if self.bits == 8 else torch.cat([packed & 15, packed >> 4], dim=-1)


def _up(x: Tensor) -> Tensor:
    """float16, rounded up, so that nothing exceeds the largest code."""
    half = x.half()
    return torch.where(half.float() < x, torch.nextafter(half, half.new_full((), torch.inf)), half)


Summary = KeyBounds | SubPages
