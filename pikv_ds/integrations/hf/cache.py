"""`PiKVCache`: the sharded store as a transformers `Cache`."""

from __future__ import annotations

import threading
import weakref
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from pikv_ds.core.cache import ExpertShardedKVCache
from pikv_ds.core.sequences import SequenceBatch
from pikv_ds.errors import LostRankError, PiKVError, UsageError

CACHE = next(name for name in ("cache", "past_key_values") if name in GenerateDecoderOnlyOutput.__dataclass_fields__)
"""transformers' name for a cache among arguments and outputs: ``past_key_values``, later ``cache``."""


class UnsupportedModelError(UsageError):
    """The model does something with its keys and values that this cache would get wrong."""


class LayerTap(threading.local):
    """What ties one attention module to the cache. What is under way is each thread's own.

    Attributes:
        entered: whether this thread is in the module's forward pass.
        pending: the cache through which the module has just handed over its keys; taken by the attention.
        running: cache, rows and columns of the pass, between the attention and the router.
        inputs: hidden states ``[B, T, hidden]`` and rotary embeddings of the pass, where a retention wants them.
    """

    def __init__(self, index: int, module: nn.Module, has_router: bool) -> None:
        self.index, self.module, self.has_router = index, module, has_router
        self.entered = False
        self.pending: PiKVCache | None = None
        self.running: tuple[PiKVCache, tuple[int, int]] | None = None
        self.inputs: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Of `copy.deepcopy` and `pickle`, mostly of the module."""
        raise NotImplementedError("layers are not copied or pickled while PiKV is attached: call pikv_ds.detach first")


class Owner(Protocol):
    """The attachment of the model that a cache serves (`hf.Attachment`)."""

    store: ExpertShardedKVCache
    layers: dict[int, LayerTap]
    attached: bool

    @property
    def passing(self) -> bool:
        """Whether a pass with a cache is under way."""
        ...

    def obstacle(self, layer_idx: int) -> str | None:
        """Why the caller must not hand over keys and values of this layer now; None if it may."""
        ...

    def take_turn(self) -> bool:
        """Makes this thread the one whose pass with a cache is under way; False: another's is."""
        ...


class PiKVCache(Cache):
    """A batch of sequences in the sharded store, as transformers' models take it.

    Pass it as ``past_key_values`` to keep sequences over several calls; `release` gives their pages back with the
    next pass of the model, and so does losing the last reference to it. It serves the model that it was made for, as
    long as PiKV is attached there; anything else is refused before it computes.

    Args:
        attachment: of the model.
        release_finished: give back the pages of each sequence as soon as it is finished.
    """

    def __init__(self, attachment: Owner, release_finished: bool = False) -> None:
        super().__init__(layers=[])
        self.attachment, self.store = attachment, attachment.store
        self.batch: SequenceBatch | None = None
        self._history: tuple[int, Tensor | None] = (
            0,
            None,
        )  # columns, and which of the first are tokens, after the last pass
        self._before: tuple[int, Tensor | None] = 0, None  # the same before it
        self._undone = 0  # passes of the batch that were undone before it
        self.places: tuple[Tensor, Tensor] | None = None  # rows and columns of this pass's tokens; None: all
        self.idle = False  # passes serve the other ranks and append nothing
        self.generating = False  # in `generate`'s loop, where every pass appends ones to the mask
        self.release_finished = release_finished

    @property
    def history(self) -> tuple[int, Tensor | None]:
        """Columns so far, and bool ``[B, n]``: which of the first are tokens; all that follow are. None: all are.

        A pass that was broken off is not part of it, from its end on: positions follow from here before the next one
        begins."""
        batch = self.batch
        if batch is None:
            return self._history
        broken = batch is self.store.broken_off and not self.attachment.passing
        return self._before if broken or batch.undone != self._undone else self._history

    def adopt(self, batch: SequenceBatch, columns: int) -> None:
        """Goes on with a batch to which somebody else has given its first tokens, equally many of each sequence."""
        self.batch, self._history, self._before, self._undone = batch, (columns, None), (0, None), batch.undone

    @property
    def columns(self) -> int:
        """Tokens of a sequence so far, padding included."""
        return self.history[0]

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Announces new keys and values; the attention function takes them from here.

        Raises:
            PiKVError: the cache belongs to another model than the caller, or the caller's attention is not PiKV's.
        """
        problem = self.attachment.obstacle(layer_idx)
        if problem is not None:
            self.refuse(problem, first=layer_idx == 0)
        if not self.attachment.take_turn():  # the other ranks are in that thread's pass, and are told nothing
            raise PiKVError(
                "another thread makes a forward pass of this model; calls of generate wait for each other, around "
                "forward passes of your own put a lock"
            )
        self.attachment.layers[layer_idx].pending = self
        return key_states, value_states

    def refuse(self, problem: str, first: bool) -> NoReturn:
        """Raises `PiKVError`.

        Args:
            first: no layer of the pass has run, so the other ranks wait in its step plan and can be told.
        """
        if first and self.attachment.attached:
            try:
                self.store.begin_step(None, [], error=problem)
            except LostRankError as error:  # the others are somewhere else
                raise LostRankError(f"{problem}; and the other ranks could not be told: {error}") from error
        raise PiKVError(problem)

    def begin(self, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> SequenceBatch:
        """Starts a forward pass with the first layer's keys and values ``[B, K, T, D]``."""
        rows, width = key.shape[0], key.shape[2]
        if self.batch is None:
            self.batch = self.store.new_batch(rows)
            weakref.finalize(self, self.store.abandoned.append, self.batch)
        batch, error = self.batch, self._cast(key) or self._cast(value)
        before = columns, shown = self._before if batch is self.store.broken_off else self.history
        if len(batch) != rows:
            error = f"the cache holds {len(batch)} sequences, the batch has {rows}; use a new cache for another batch"
        elif attention_mask is not None and attention_mask.dim() != 2:
            error = "pass attention_mask as [batch, tokens]; prepared masks of another shape are not supported"
        elif not self.idle and not any(batch.alive):
            error = "the cache has been released (an error releases it, too); use a new one"
        elif not self.idle and not self.generating and not all(batch.alive):
            error = f"row {batch.alive.index(False)} of the cache has been released; use a new cache for the others"
        elif torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            error = "PiKV's cache keeps no gradients: make passes with a cache under torch.no_grad()"
        elif not self.idle and not self.generating:
            error = error or self._other_history(attention_mask, columns, shown)
        new = [width if alive and not self.idle else 0 for alive in batch.alive]
        tokens = None
        if attention_mask is not None and not self.generating and any(new) and error is None:
            mask = attention_mask[:, columns : columns + width].bool()
            if mask.shape[1] != width:
                error = f"attention_mask has {attention_mask.shape[1]} columns, cache and batch {columns + width}"
            elif not bool(mask.all()):
                shown = _shown(mask, columns, shown)
                tokens = mask & torch.tensor(batch.alive, device=mask.device)[:, None]
                new = tokens.sum(1).tolist()
        if tokens is None and not all(new):
            tokens = (torch.tensor(new, device=key.device)[:, None] > 0).expand(-1, width)
        self.places = None if tokens is None else tokens.nonzero(as_tuple=True)  # type: ignore[assignment]
        self.store.begin_step(batch, new if error is None else [0] * len(batch), error)
        self._before, self._undone = before, batch.undone
        self._history = columns + (0 if self.idle else width), shown
        return batch

    def _other_history(self, attention_mask: Tensor | None, columns: int, shown: Tensor | None) -> str | None:
        """What to say of a mask that hides what was a token when it came into the cache, or the other way round."""
        if not columns or (attention_mask is None and shown is None):
            return None
        wanted = torch.ones(self.batch_size, columns, dtype=torch.bool, device=self.store.device)
        if shown is not None:
            wanted[:, : shown.shape[1]] = shown
        if attention_mask is None:
            return "the cache has padding; pass the attention_mask of the whole text, what is in the cache included"
        seen = attention_mask[:, :columns].bool()
        if seen.shape != wanted.shape or bool((seen == wanted).all()):
            return None  # too few columns are another error
        row, column = (seen != wanted).nonzero()[0].tolist()
        what = "shows" if bool(seen[row, column]) else "hides"
        return (
            f"attention_mask {what} row {row}, column {column}, which is in the cache as "
            f"{'padding' if what == 'shows' else 'a token'}; what is in a cache stays as it was: use a new one"
        )

    def _cast(self, x: Tensor) -> str | None:
        """What to say of keys or values that are not as the model's were when PiKV was attached."""
        made_for, device = self.store.shape.dtype, self.store.device
        if x.dtype != made_for:
            return (
                f"the model's keys or values are {x.dtype}, but they were {made_for} when PiKV was attached: cast the "
                "model first and attach then (and leave autocast out)"
            )
        if x.device.type != device.type or (device.index is not None and x.device.index != device.index):
            return (
                f"the model's keys and values are on {x.device}, but they were on {device} when PiKV was attached: "
                "move the model first and attach then"
            )
        return None

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

    # -- what transformers asks of a cache -----------------------------------------------------

    def __len__(self) -> int:
        return self.store.shape.num_layers

    def __repr__(self) -> str:
        rows = 0 if self.batch is None else len(self.batch)
        return f"PiKVCache({rows} sequences, {self.columns} columns)"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int) -> tuple[int, int]:
        """Keys that a pass sees, and where they begin.

        Args:
            query_length: new tokens; before transformers 5.4 the cache positions of them.
        """
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.columns + new, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return -1 if self.batch is None else len(self.batch)

    @property
    def max_batch_size(self) -> int:
        return self.batch_size

    @property
    def max_cache_len(self) -> int:
        return -1

    @property
    def is_initialized(self) -> bool:
        return self.batch is not None

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    def reset(self) -> None:
        self.release()
        self.batch, self._history, self._before, self._undone = None, (0, None), (0, None), 0

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def activate_past_recording(self) -> None:
        raise NotImplementedError("PiKV does not record states to return to (assisted decoding); leave it out")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError("PiKV does not support beam search; use num_beams=1")

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("PiKV does not support cropping (assisted decoding); decode without an assistant")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise NotImplementedError("PiKV does not repeat sequences that are in the cache; repeat the prompt")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise NotImplementedError("PiKV does not reorder sequences that are in the cache; use a new cache")

    def early_initialization(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("PiKV's cache allocates pages as they fill up; it cannot be initialized early")

    def offload(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("PiKV places its pages itself; leave transformers' offloading out")

    prefetch = offload

    def _no_state(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            "PiKV keeps keys and values of full attention, no states of convolutions, recurrences or indexers"
        )

    get_conv_state = update_conv_state = get_recurrent_state = update_recurrent_state = _no_state
    has_previous_state = update_indexer = _no_state

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Of `copy.copy`, `copy.deepcopy` and `pickle`."""
        raise NotImplementedError(
            "PiKV does not copy or save caches: their pages lie on several ranks, once. For several questions on one "
            "prompt, generate with the prompt repeated"
        )


def _shown(mask: Tensor, columns: int, shown: Tensor | None) -> Tensor:
    """Which columns are tokens, those of this pass (`mask`) included, where some are not."""
    before = mask.new_ones(len(mask), columns)
    if shown is not None:
        before[:, : shown.shape[1]] = shown
    return torch.cat([before, mask], dim=1)
