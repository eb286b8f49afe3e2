"""Codecs: how the bytes of a sealed page are encoded.

The integer codecs follow KIVI (Liu et al. 2024): keys are quantized per channel within a page,
because key channels have outliers; values per token, because value outliers follow tokens. Both
are asymmetric, with scale and minimum in float16 beside the data; the open tail stays in full
precision. fp8 (e4m3, Micikevicius et al. 2022) is scaled along the same lines, without a minimum.
Latent pages have keys alone (see `pikv_ds.layout`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pikv_ds.layout import BITS, PLAIN, PageLayout


@dataclass(frozen=True)
class Codec:
    """What an element is stored as; None: the model's own type."""

    name: str
    element: str | None

    def layout(
        self, num_kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype, latent_dim: int | None = None
    ) -> PageLayout:
        """The layout of one page in bytes.

        Args:
            latent_dim: see `PageLayout`.

        Raises:
            ValueError: the head size cannot be packed (int4 puts two channels into a byte, int2 four),
                the model's type cannot be stored, or there are more latent than key channels.
        """
        if dtype not in PLAIN:
            raise ValueError(f"keys and values of type {dtype}: pages take float32, bfloat16 or float16")
        element = self.element or PLAIN[dtype]
        per_byte = max(1, 8 // BITS[element])
        if head_dim % per_byte:
            raise ValueError(
                f'pikv.codec = "{self.name}": packs {per_byte} channels into a byte, but head_dim is {head_dim}; '
                'use "int8"'
            )
        return PageLayout(num_kv_heads, head_dim, page_size, dtype, element, latent_dim)


CODECS: dict[str, Codec] = {
    c.name: c for c in (Codec("none", None), *(Codec(element, element) for element in ("fp8", "int8", "int4", "int2")))
}
