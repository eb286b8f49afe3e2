"""`ModelShape`: what the cache must know of a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ModelShape:
    """What the cache must know of a model. The same on every rank."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    """Experts of the routed layers; a model without any counts one per rank."""
    dtype: torch.dtype
    latent_dim: int | None = None
    """Latent attention: the values are so many leading channels of the keys (see `PageLayout`)."""
    unrouted: tuple[int, ...] = ()
    """Layers whose choice of experts is not known, as there is none or it cannot be read: their pages are placed by
    number."""

    @property
    def value_dim(self) -> int:
        """Channels of a value, and of an attention output."""
        return self.head_dim if self.latent_dim is None else self.latent_dim

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers in an unsharded, uncompressed cache (of latents, where it has them)."""
        elements = self.head_dim + (self.head_dim if self.latent_dim is None else 0)
        return self.num_layers * self.num_kv_heads * elements * self.dtype.itemsize
