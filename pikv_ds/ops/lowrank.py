"""Low-rank pages: keys and values stored as coefficients in a basis of each KV head.

Attention works on the coefficients themselves: the query goes into the keys' basis before it meets
the pages, the output leaves the values' basis after it, and no key or value is ever rebuilt (as
Palu, Chang et al. 2024, and Eigen Attention, Saxena et al. 2024, do). The pages are ordinary ones
whose head size is the rank, in any element. The projections are torch's matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pikv_ds.layout import PageLayout
from pikv_ds.ops import Ops
from pikv_ds.slabs import Slabs


@dataclass(frozen=True)
class Projections:
    """Bases of one layer, with orthonormal columns: D is the head size, r the rank.

    The keys' basis is that of keys as the cache gets them, positions already encoded.
    """

    keys: Tensor
    """``[K, D, r]``"""
    values: Tensor
    """``[K, D, r]``"""

    def seal_pages(
        self,
        ops: Ops,
        keys: Tensor,
        values: Tensor,
        layout: PageLayout,
        out: Tensor,
        bounds: Tensor | None,
        nonfinite: Tensor,
    ) -> None:
        """`Ops.seal_pages` of the coefficients.

        Args:
            keys, values: ``[N, K, S, D]``.
            layout: of the pages, with ``head_dim = r``.
        """
        self._check(layout)
        key_coefficients, value_coefficients = _project(keys, self.keys), _project(values, self.values)
        ops.seal_pages(key_coefficients, value_coefficients, layout, out, bounds, nonfinite)

    def decode_attention(
        self,
        ops: Ops,
        query: Tensor,
        slabs: Slabs,
        table: Tensor,
        counts: Tensor,
        layout: PageLayout,
        scale: float,
        out: Tensor,
        lse: Tensor,
        page_lse: Tensor | None = None,
    ) -> None:
        """`Ops.decode_attention` on low-rank pages.

        Args:
            query: ``[R, H, D]``.
            scale: the model's, for its head size D.
            out: float32 ``[R, H, D]``. The rest as there.
        """
        self._check(layout)
        rows, num_heads, _ = query.shape
        grouped = query.unflatten(1, (layout.num_kv_heads, -1)).transpose(0, 1).flatten(1, 2)  # [K, R * G, D]
        projected = (grouped @ self.keys.to(query.dtype)).unflatten(1, (rows, -1)).transpose(0, 1).flatten(1, 2)
        inner = torch.empty(rows, num_heads, layout.head_dim, dtype=torch.float32, device=query.device)
        ops.decode_attention(projected.contiguous(), slabs, table, counts, layout, scale, inner, lse, page_lse)
        inner = inner.unflatten(1, (layout.num_kv_heads, -1)).transpose(0, 1).flatten(1, 2)
        restored = inner @ self.values.float().transpose(1, 2)
        out.copy_(restored.unflatten(1, (rows, -1)).transpose(0, 1).flatten(1, 2))

    def _check(self, layout: PageLayout) -> None:
        for name, basis in (("keys", self.keys), ("values", self.values)):
            expected = layout.num_kv_heads, layout.head_dim
            if basis.dim() != 3 or (basis.shape[0], basis.shape[2]) != expected:
                raise ValueError(
                    f"projections.{name} must be [KV heads, head size, rank] with {expected[0]} heads and the "
                    f"layout's rank {expected[1]}, got {list(basis.shape)}"
                )


def _project(x: Tensor, basis: Tensor) -> Tensor:
    """Coefficients ``[N, K, S, r]`` of ``[N, K, S, D]``, in its dtype."""
    return (x.float() @ basis.float()).to(x.dtype)
