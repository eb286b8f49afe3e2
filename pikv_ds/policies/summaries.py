"""Summaries: what a page shows a lookup instead of its keys.

A summary is a part of a page with a format of its own, stored apart from the page's bytes, so that
a lookup reads summaries only. A lookup names the one it needs; where none does, none is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from pikv_ds.layout import PageLayout


class Summary(Protocol):
    """The format of a page's summary."""

    def num_bytes(self, layout: PageLayout) -> int:
        """Bytes of one page's summary."""
        ...

    def write(self, ops: Any, keys: Tensor, out: Tensor) -> None:
        """Takes the summaries of full pages.

        Args:
            ops: the `pikv_ds.ops.Ops` to compute with.
            keys: ``[N, K, S, D]``, before they are encoded.
            out: uint8 ``[N, num_bytes]``.
        """
        ...


@dataclass(frozen=True)
class KeyBounds:
    """Minimum and maximum of each key channel over the page (Quest, Tang et al. 2024): ``[2, K, D]``."""

    def num_bytes(self, layout: PageLayout) -> int:
        return 2 * layout.num_kv_heads * layout.head_dim * layout.dtype.itemsize

    def write(self, ops: Any, keys: Tensor, out: Tensor) -> None:
        ops.page_bounds(keys, out)
