"""Codecs: how the bytes of a sealed page are encoded.

The integer codecs follow KIVI (Liu et al. 2024): keys are quantized per channel within a page,
because key channels have outliers; values per token, because value outliers follow tokens. Both
are asymmetric, with scale and minimum in float16 beside the data; the open tail stays in full
precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pikv_ds.layout import PageLayout


@dataclass(frozen=True)
class Codec:
    """How many bits an element takes; None stores it in the model's own type."""

    name: str
    bits: int | None

    def layout(self, num_kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype) -> PageLayout:
        """The layout of one page in bytes.

        Raises:
            ValueError: the head size cannot be packed (int4 puts two channels into a byte).
        """
        if self.bits == 4 and head_dim % 2:
            raise ValueError(
                f'pikv.codec = "{self.name}": packs two channels into a byte, but head_dim is {head_dim}; use "int8"'
            )
        return PageLayout(num_kv_heads, head_dim, page_size, dtype, self.bits)


CODECS: dict[str, Codec] = {c.name: c for c in (Codec("none", None), Codec("int8", 8), Codec("int4", 4))}
