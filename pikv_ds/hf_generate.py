"""`generate` of a model with PiKV: argument checks, chunked prefill, ranks in step."""

from __future__ import annotations

import contextlib
import functools
import re
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from pikv_ds.errors import LostRankError, PeerError, PiKVError
from pikv_ds.exchange import talking
from pikv_ds.hf_cache import PiKVCache

if TYPE_CHECKING:
    from pikv_ds.hf import Attachment


def generate(
    attachment: Attachment,
    inputs: Tensor | None = None,
    generation_config: Any = None,
    **kwargs: Any,
) -> Any:
    """`generate` over the sharded cache, all ranks in step.

    As transformers', with these differences: the cache is ours; on several ranks `synced_gpus` is
    always on, so that a rank that finishes early serves its shard until all are done; an empty
    batch (``[0, T]``) is allowed and takes part likewise; prompts go through the model in chunks
    of ``prefill_chunk_tokens``.
    """
    model, store = attachment.model, attachment.store
    settings = generation_config or model.generation_config
    ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
    problem = _problem(attachment, ids, settings, kwargs)
    chunk = store.config.prefill_chunk_tokens
    num_chunks = 1
    if problem is None and chunk is not None and len(ids):
        num_chunks = -(-(ids.shape[1] - _seen(kwargs)) // chunk)
    lockstep = Lockstep()
    most_chunks = lockstep.agree(num_chunks, problem, store.device)

    own = kwargs.get("past_key_values")
    cache = own if own is not None else attachment.new_cache(release_finished=True)
    kwargs["past_key_values"] = cache
    wants_dict = kwargs.get("return_dict_in_generate", settings.return_dict_in_generate)
    if wants_dict:
        cache.release_finished = False  # the caller gets the cache and may go on with it
    if lockstep.several:
        kwargs["synced_gpus"] = True
    repeats = kwargs.pop("num_return_sequences", None) or settings.num_return_sequences or 1
    if repeats > 1:
        ids = ids.repeat_interleave(repeats, dim=0)
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = kwargs["attention_mask"].repeat_interleave(repeats, dim=0)
        kwargs["num_return_sequences"] = 1
    try:
        if len(ids) == 0:
            _serve_only(attachment, attachment.new_cache(), most_chunks, lockstep)
            store.begin_step(None, [])
            return GenerateDecoderOnlyOutput(sequences=ids) if wants_dict else ids
        for _ in range(most_chunks - num_chunks):
            _idle_pass(attachment, attachment.new_cache())
        if num_chunks > 1:
            assert chunk is not None
            kwargs["attention_mask"] = mask = _padding(ids, settings, kwargs)
            _prefill_chunks(attachment, cache, ids, mask, chunk, num_chunks)
        model._get_stopping_criteria = lambda *a, **k: ReleasingCriteria(attachment._get_criteria(*a, **k), cache)
        model._has_unfinished_sequences = functools.partial(_unfinished, cache, lockstep)
        out = attachment._generate(ids, generation_config=generation_config, **kwargs)
        if cache.release_finished:
            cache.release()
        store.begin_step(None, [])  # closing plan: returns the pages, and reports what the last pass found
        return out
    except LostRankError:
        raise
    except Exception as error:
        if _LOST_RANK.search(str(error)) and isinstance(error, RuntimeError) and not isinstance(error, PiKVError):
            with talking("ran the model's own exchange"):  # says what to look for
                raise
        passing = cache.batch is not None and cache.batch.in_step  # then the others are within the pass, too
        if isinstance(error, PiKVError) or not passing:
            lockstep.fail(error, store.device)
        cache.release()
        raise
    finally:
        for name in ("_get_stopping_criteria", "_has_unfinished_sequences"):
            model.__dict__.pop(name, None)
        cache.idle = False
        if cache.release_finished:
            cache.release()


def _unfinished(
    cache: PiKVCache, lockstep: Lockstep, this_peer_finished: Any, synced_gpus: bool, device: torch.device
) -> bool:
    """The check at the top of transformers' loop; a rank that is done makes idle passes from here on."""
    cache.idle = bool(this_peer_finished)
    return lockstep.unfinished(cache.idle, device)


def _problem(attachment: Attachment, ids: Tensor | None, settings: Any, kwargs: dict[str, Any]) -> str | None:
    """What is wrong with the call, in a sentence."""
    if ids is None or ids.dim() != 2:
        return "generate: pass input_ids of shape [batch, tokens]"
    wanted = {key: kwargs.get(key, getattr(settings, key, None)) for key in _REFUSED}
    for key, (neutral, remedy) in _REFUSED.items():
        if wanted[key] not in neutral:
            return f"generate: {key} = {wanted[key]!r} is not supported: {remedy}"
    if kwargs.get("synced_gpus") is False and dist.is_initialized() and dist.get_world_size() > 1:
        return "generate: synced_gpus=False would hang the other ranks when this one finishes; leave it out"
    own = kwargs.get("past_key_values")
    if own is not None and not isinstance(own, PiKVCache):
        return f"generate: past_key_values is a {type(own).__name__}; use pikv_ds.new_cache(model), or detach first"
    vocabulary = attachment.model.get_input_embeddings().weight.shape[0]
    if len(ids) and (int(ids.max()) >= vocabulary or int(ids.min()) < 0):
        return f"generate: input_ids must lie in [0, {vocabulary}), got {int(ids.min())} to {int(ids.max())}"
    limit = getattr(attachment.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    new = kwargs.get("max_new_tokens", settings.max_new_tokens) or 1
    if limit is not None and len(ids) and ids.shape[1] + new > limit:
        return (
            f"generate: a prompt of {ids.shape[1]} tokens and {new} new ones exceed the model's context of {limit}; "
            "shorten the prompt or lower max_new_tokens"
        )
    return None


_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((None, 1), "beam search reorders the cache; use num_beams=1"),
    "use_cache": ((None, True), "without a cache there is nothing to shard; detach first"),
    "cache_implementation": ((None, "dynamic"), "the cache is PiKV's; detach first to use another"),
    "assistant_model": ((None,), "assisted decoding crops the cache; decode without an assistant"),
    "prompt_lookup_num_tokens": ((None,), "prompt lookup crops the cache; leave it out"),
    "penalty_alpha": ((None, 0, 0.0), "contrastive search reorders the cache; leave it out"),
    "output_attentions": ((None, False), "there are no attention weights to return; detach first"),
    "prefill_chunk_size": (
        (None,),
        "set pikv.prefill_chunk_tokens instead, so that all ranks agree",
    ),
}


_LOST_RANK = re.compile(r"gloo|NCCL|connection (closed|reset)", re.IGNORECASE)
"""What torch's process groups say in a RuntimeError when a peer is gone."""


class ReleasingCriteria(StoppingCriteriaList):
    """Stopping criteria that also give back the pages of the sequences that they stop."""

    def __init__(self, criteria: StoppingCriteriaList, cache: PiKVCache) -> None:
        super().__init__(criteria)
        self.cache = cache

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = super().__call__(input_ids, scores, **kwargs)
        if self.cache.release_finished and bool(done.any()):
            self.cache.release(done.nonzero().squeeze(1).tolist())
        return done


class Lockstep:
    """All ranks of the world in one generation loop.

    Replaces transformers' check at the top of its loop, one all-reduce over the world, by one that
    also tells when a rank has failed: its error reaches the others there instead of leaving them
    waiting. Two EP groups of a world are in step with each other by this alone.
    """

    def __init__(self) -> None:
        self.several = dist.is_initialized() and dist.get_world_size() > 1
        self._over = False  # nobody waits in the loop's check any more

    def agree(self, num_chunks: int, problem: str | None, device: torch.device) -> int:
        """The most chunks of any rank; raises on every rank if one has a problem with its call."""
        if not self.several:
            if problem:
                raise ValueError(problem)
            return num_chunks
        both = torch.tensor([num_chunks, int(problem is not None)], device=device)
        with talking("prepared a generation"):
            dist.all_reduce(both, op=dist.ReduceOp.MAX)
        if int(both[1]):
            message = self._reasons(problem)
            raise ValueError(message) if problem else PeerError(message)
        return int(both[0])

    def unfinished(self, this_peer_finished: bool, device: torch.device) -> bool:
        """Whether any rank goes on."""
        if not self.several:
            return not this_peer_finished
        if self._check(not this_peer_finished, None, device):
            return True
        self._over = True
        return False

    def fail(self, error: Exception, device: torch.device) -> None:
        """Tells the others, who come to the loop's check, why this rank ends."""
        if self.several and not self._over:
            with contextlib.suppress(PeerError):
                self._check(False, f"{type(error).__name__}: {error}", device)

    def _check(self, going_on: bool, failure: str | None, device: torch.device) -> bool:
        flags = torch.tensor([int(going_on), int(failure is not None)], device=device)
        with talking("waited for the next pass"):
            dist.all_reduce(flags)
        if int(flags[1]):
            self._over = True
            raise PeerError(self._reasons(failure))
        return bool(flags[0])

    @staticmethod
    def _reasons(reason: str | None) -> str:
        texts: list[str | None] = [None] * dist.get_world_size()
        with talking("exchanged the reason of an error"):
            dist.all_gather_object(texts, reason)
        return "; ".join(f"rank {r}: {t}" for r, t in enumerate(texts) if t)


def _seen(kwargs: dict[str, Any]) -> int:
    cache = kwargs.get("past_key_values")
    return 0 if cache is None else cache.get_seq_length()


def _idle_pass(attachment: Attachment, cache: PiKVCache) -> None:
    """A forward pass of one padding token that leaves nothing behind but serves the others."""
    cache.idle = True
    token = torch.zeros(1, 1, dtype=torch.long, device=attachment.model.device)
    with torch.no_grad():
        attachment.model(input_ids=token, past_key_values=cache, use_cache=True)


def _serve_only(attachment: Attachment, cache: PiKVCache, passes: int, lockstep: Lockstep) -> None:
    """A rank without sequences: makes the others' passes until all are done."""
    if not lockstep.several:
        return
    for _ in range(passes):
        _idle_pass(attachment, cache)
    round_needs_pass = False  # the first round of the others' loop takes the logits of the prefill
    while lockstep.unfinished(True, attachment.store.device):
        if round_needs_pass:
            _idle_pass(attachment, cache)
        round_needs_pass = True


def _padding(ids: Tensor, settings: Any, kwargs: dict[str, Any]) -> Tensor:
    """The padding mask, found as `generate` finds it: padding tokens, unless they also end texts."""
    mask = kwargs.get("attention_mask")
    pad, eos = (kwargs.get(key, getattr(settings, key)) for key in ("pad_token_id", "eos_token_id"))
    ends = eos if isinstance(eos, list) else [eos]
    if mask is None and pad is not None and pad not in ends:
        return ids.ne(pad).long()
    return torch.ones_like(ids) if mask is None else mask


def _prefill_chunks(
    attachment: Attachment, cache: PiKVCache, ids: Tensor, mask: Tensor, chunk: int, num_chunks: int
) -> None:
    """All chunks of the prompt but the last, which `generate` itself takes."""
    start = cache.get_seq_length()
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    for _ in range(num_chunks - 1):
        end = start + chunk
        with torch.no_grad():
            attachment.model(
                input_ids=ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        start = end
