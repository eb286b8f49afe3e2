"""Summaries: what a page shows a lookup instead of its keys.

A summary is a part of a page with a format of its own, stored apart from the page's bytes, so that
a lookup reads summaries only. A lookup names the one it needs; where none does, none is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

from pikv_ds.layout import PageLayout


@dataclass(frozen=True)
class KeyBounds:
    """Minimum and maximum of each key channel over the page (Quest, Tang et al. 2024): ``[2, K, D]``.

    `seal_pages` takes them while it encodes the page.
    """

    def num_bytes(self, layout: PageLayout) -> int:
        """Bytes of one page's summary."""
        return layout.bounds_bytes
