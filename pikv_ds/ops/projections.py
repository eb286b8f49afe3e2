"""Projected pages: keys and values stored as coefficients in bases of each KV head.

Attention works on the coefficients themselves: the query goes into the keys' basis before it meets the pages, the
output leaves the values' basis after it, and no key or value is ever rebuilt (as Palu, Chang et al. 2024, and Eigen
Attention, Saxena et al. 2024, do for low ranks, and QuaRot, Ashkboos et al. 2024, for rotations):

    q . k' = q . (k E R^T) = (q R) . (k E)            sum_t a_t v_t' = (sum_t a_t v_t E) R^T

with E what keys (values) are encoded with and R what they are read with. The pages are ordinary ones whose head
size is the rank, of any element. Everything here is a matrix product per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Projections:
    """Bases of one layer; D is the head size, r the rank of the keys, s that of the values.

    The keys are those that the cache gets, positions already encoded.
    """

    key_encode: Tensor
    """``[K, D, r]``"""
    key_read: Tensor
    """``[K, D, r]``; the same for orthonormal bases."""
    value_encode: Tensor
    """``[K, D, s]``"""
    value_read: Tensor
    """``[K, D, s]``"""

    @classmethod
    def of_bases(cls, keys: Tensor, values: Tensor) -> Projections:
        """Orthonormal bases, which read what they have encoded."""
        return cls(keys, keys, values, values)

    def heads(self, first: int, count: int) -> Projections:
        """The bases of some KV heads."""
        return Projections(*(x[first : first + count] for x in vars(self).values()))

    def encode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients of ``[N, K, S, D]``, in its dtype: ``[N, K, S, r]`` and ``[N, K, S, s]``."""
        return tuple((x.float() @ e).to(x.dtype) for x, e in ((keys, self.key_encode), (values, self.value_encode)))  # type: ignore[return-value]

    def decode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[N, K, S, D]`` of coefficients ``[N, K, S, r]`` and ``[N, K, S, s]``, float32."""
        return keys.float() @ self.key_read.transpose(1, 2), values.float() @ self.value_read.transpose(1, 2)

    def query(self, query: Tensor) -> Tensor:
        """Queries ``[R, H, D]`` in the keys' basis, ``[R, H, r]``, in their dtype."""
        return _by_head(query.float(), self.key_read).to(query.dtype)

    def output(self, out: Tensor) -> Tensor:
        """Outputs over coefficients, float32 ``[R, H, s]``, as outputs ``[R, H, D]``."""
        return _by_head(out, self.value_read.transpose(1, 2))


def _by_head(x: Tensor, matrices: Tensor) -> Tensor:
    """``[R, H, a]`` times the matrix ``[K, a, b]`` of each row's KV head: ``[R, H, b]``."""
    rows = len(x)
    grouped = x.unflatten(1, (len(matrices), -1)).transpose(0, 1).flatten(1, 2)  # [K, R * G, a]
    return (grouped @ matrices).unflatten(1, (rows, -1)).transpose(0, 1).flatten(1, 2)


MOST_UNEVEN = 8.0
"""`unevenness` of a layer's keys from which a rotation costs more accuracy than it brings (docs/policies.md)."""


def unevenness(keys: Tensor) -> Tensor:
    """How far the channels of some pages differ in what their codes must span, one number on the device.

    Of each page and head the largest range of a channel over the page's tokens, relative to the median channel's; the
    mean over pages and heads. A rotation gives every channel about the root mean square of all ranges: with few
    outliers the others' steps grow by nearly this factor. What is constant within a page costs nothing, as a page
    stores minima, so magnitudes are not asked for.

    Args:
        keys: ``[N, K, S, D]``.
    """
    ranges = keys.amax(2).float() - keys.amin(2).float()
    return (ranges.amax(-1) / ranges.median(-1).values).mean()


def hadamard(size: int) -> Tensor:
    """An orthogonal matrix ``[size, size]`` whose entries are of one magnitude, so that it spreads outliers evenly.

    Sylvester's construction for powers of two; for other sizes its Kronecker product with a random orthogonal matrix
    (of a fixed seed) of the odd part.
    """
    odd = size // (size & -size)
    out = torch.linalg.qr(torch.randn(odd, odd, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[
        0
    ].contiguous()
    if odd == 1:
        out = out.abs()
    block = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    while len(out) < size:
        out = torch.kron(block, out)
    return out.float()
