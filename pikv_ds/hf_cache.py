"""`PiKVCache`: the sharded store as a transformers `Cache`."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from pikv_ds.cache import ExpertShardedKVCache
from pikv_ds.sequences import SequenceBatch


class UnsupportedModelError(ValueError):
    """The model does something with its keys and values that this cache would get wrong."""


@dataclass(eq=False)
class LayerTap:
    """What ties one attention module to the cache."""

    index: int
    has_router: bool
    pending: PiKVCache | None = None
    """The cache through which the module has just handed over its keys; taken by the attention."""
    running: tuple[PiKVCache, tuple[int, int]] | None = None
    """Cache, rows and columns of the pass, between the attention and the router."""
    inputs: tuple[Tensor, tuple[Tensor, Tensor]] | None = None
    """Hidden states ``[B, T, hidden]`` and rotary embeddings of the pass, where a retention wants them."""


class PiKVCache(Cache):
    """A batch of sequences in the sharded store, as transformers' models take it.

    Pass it as ``past_key_values`` to keep sequences over several calls; `release` gives their
    pages back, and so does losing the last reference to it.
    """

    def __init__(self, store: ExpertShardedKVCache, release_finished: bool = False) -> None:
        super().__init__(layers=[])
        self.store = store
        self.batch: SequenceBatch | None = None
        self.columns = 0
        self.places: tuple[Tensor, Tensor] | None = None  # rows and columns of this pass's tokens; None: all
        self.idle = False  # passes serve the other ranks and append nothing
        self.generating = False  # in `generate`'s loop, where every pass appends ones to the mask
        self.release_finished = release_finished
        self.layer_of: Mapping[int, LayerTap] = {}

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        cache_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Announces new keys and values; the attention function takes them from here."""
        if layer_idx not in self.layer_of:
            raise UnsupportedModelError(f"layer {layer_idx} was not there when PiKV was attached; attach again")
        self.layer_of[layer_idx].pending = self
        return key_states, value_states

    def begin(self, key: Tensor, attention_mask: Tensor | None) -> SequenceBatch:
        """Starts a forward pass with the first layer's keys ``[B, K, T, D]``."""
        rows, width = key.shape[0], key.shape[2]
        if self.batch is None:
            self.batch = self.store.new_batch(rows)
            weakref.finalize(self, self.store.abandoned.append, self.batch)
        batch, error = self.batch, None
        if len(batch) != rows:
            error = f"the cache holds {len(batch)} sequences, the batch has {rows}; use a new cache for another batch"
        elif attention_mask is not None and attention_mask.dim() != 2:
            error = "pass attention_mask as [batch, tokens]; prepared masks of another shape are not supported"
        elif not self.idle and not any(batch.alive):
            error = "the cache has been released (an error releases it, too); use a new one"
        new = [width if alive and not self.idle else 0 for alive in batch.alive]
        tokens = None
        if attention_mask is not None and not self.generating and any(new) and error is None:
            mask = attention_mask[:, self.columns : self.columns + width].bool()
            if mask.shape[1] != width:
                error = f"attention_mask has {attention_mask.shape[1]} columns, cache and batch {self.columns + width}"
            elif not bool(mask.all()):
                tokens = mask & torch.tensor(batch.alive, device=mask.device)[:, None]
                new = tokens.sum(1).tolist()
        if tokens is None and not all(new):
            tokens = (torch.tensor(new, device=key.device)[:, None] > 0).expand(-1, width)
        self.places = None if tokens is None else tokens.nonzero(as_tuple=True)  # type: ignore[assignment]
        self.store.begin_step(batch, new if error is None else [0] * len(batch), error)
        self.columns += 0 if self.idle else width
        return batch

    def pack(self, x: Tensor) -> Tensor:
        """The tokens of this pass side by side: ``[B, T, ...]`` to ``[N, ...]``."""
        return x.flatten(0, 1) if self.places is None else x[self.places]

    def unpack(self, x: Tensor, like: Tensor) -> Tensor:
        """Packed tokens ``[N, ...]`` back in their rows and columns, zeros elsewhere.

        Args:
            like: ``[B, T, ...]``, the sizes.
        """
        if self.places is None:
            return x.unflatten(0, like.shape[:2])
        out = x.new_zeros(*like.shape[:2], *x.shape[1:])
        out[self.places] = x
        return out

    def release(self, rows: list[int] | None = None) -> None:
        """Gives back finished sequences (all of them by default)."""
        if self.batch is not None:
            self.store.release(self.batch, rows)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_mask_sizes(self, cache_position: Tensor, layer_idx: int) -> tuple[int, int]:
        return self.columns + cache_position.shape[0], 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    @property
    def is_initialized(self) -> bool:
        return self.batch is not None

    @property
    def is_sliding(self) -> list[bool]:
        return []

    @property
    def is_compileable(self) -> bool:
        return False

    def reset(self) -> None:
        self.release()
        self.batch, self.columns = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError("PiKV does not support beam search; use num_beams=1")

    def crop(self, max_length: int) -> None:
        raise NotImplementedError("PiKV does not support cropping (assisted decoding); decode without an assistant")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise NotImplementedError("PiKV does not repeat sequences that are in the cache; repeat the prompt")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise NotImplementedError("PiKV does not reorder sequences that are in the cache; use a new cache")
