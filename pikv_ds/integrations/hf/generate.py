"""`generate` of a model with PiKV: argument checks, chunked prefill, ranks in step."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from pikv_ds.core.exchange import talking
from pikv_ds.errors import LostRankError, PeerError, PiKVError, UsageError
from pikv_ds.integrations.hf.cache import CACHE, PiKVCache

if TYPE_CHECKING:
    from pikv_ds.core.cache import ExpertShardedKVCache
    from pikv_ds.integrations.hf.attachment import Attachment


def generate(
    attachment: Attachment,
    inputs: Tensor | None = None,
    generation_config: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`generate` over the sharded cache, all ranks in step.

    As transformers', with these differences: the cache is ours; on several ranks `synced_gpus` is
    always on, so that a rank that finishes early serves its shard until all are done; an empty
    batch (``[0, T]``) is allowed and takes part likewise; prompts go through the model in chunks
    of ``prefill_chunk_tokens``; calls from several threads wait for each other.
    """
    if args:  # each by its name, as transformers has them
        bound = inspect.signature(attachment.plain_generate).bind(inputs, generation_config, *args, **kwargs).arguments
        kwargs = {**bound.pop("kwargs", {}), **dict(list(bound.items())[2:])}
    with attachment.generate_lock:
        return _generate(attachment, inputs, generation_config, kwargs)


def _generate(attachment: Attachment, inputs: Tensor | None, generation_config: Any, kwargs: dict[str, Any]) -> Any:
    model, store = attachment.model, attachment.store
    settings, called = model.generation_config, time.perf_counter()
    ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
    chunk, num_chunks = store.config.prefill_chunk_tokens, 1
    mask: Tensor | None = None
    problem: Exception | None = None
    try:
        _take_cache_argument(kwargs)
        # As transformers merges them: arguments, then the call's configuration, then the model's.
        settings, _ = model._prepare_generation_config(generation_config, **kwargs)
        _check_call(attachment, ids, settings, kwargs)
        mask = _padding(ids, settings, kwargs)
        _check_mask(mask, ids, _seen(kwargs))
        if chunk is not None and len(ids):
            num_chunks = max(1, -(-(ids.shape[1] - _seen(kwargs)) // chunk))
        if num_chunks > 1:
            _check_chunks(ids, mask, settings, kwargs)
    except Exception as error:
        problem = error
    lockstep = Lockstep(store)
    most_chunks = lockstep.agree(num_chunks, problem)
    assert mask is not None  # all is well on this rank, too

    own = kwargs.get(CACHE)
    cache = own if own is not None else attachment.new_cache(release_finished=True)
    idle = attachment.new_cache()
    try:
        kwargs[CACHE] = cache
        wants_dict = settings.return_dict_in_generate
        if wants_dict:
            cache.release_finished = False  # the caller gets the cache and may go on with it
        if lockstep.several:
            kwargs["synced_gpus"] = True
        repeats = settings.num_return_sequences or 1
        if repeats > 1:
            ids, mask = (x.repeat_interleave(repeats, dim=0) for x in (ids, mask))
            for name in ("attention_mask", "position_ids"):
                if kwargs.get(name) is not None and len(kwargs[name]) > 1:
                    kwargs[name] = kwargs[name].repeat_interleave(repeats, dim=0)
            kwargs["num_return_sequences"] = 1
        if len(ids) == 0:
            _serve_only(attachment, idle, most_chunks, lockstep)
            store.begin_step(None, [])
            return GenerateDecoderOnlyOutput(sequences=ids) if wants_dict else ids
        for _ in range(most_chunks - num_chunks):
            _idle_pass(attachment, idle)
        if num_chunks > 1:
            assert chunk is not None
            kwargs["attention_mask"] = mask
            _prefill_chunks(attachment, cache, ids, mask, kwargs.get("position_ids"), chunk)
        model._get_stopping_criteria = lambda *a, **k: ReleasingCriteria(
            attachment._get_criteria(*a, **k), cache, Stopwatch(store, called, len(ids))
        )
        model._has_unfinished_sequences = functools.partial(_unfinished, cache, lockstep)
        out = attachment.plain_generate(ids, generation_config=generation_config, **kwargs)
        if cache.release_finished:
            cache.release()
        store.begin_step(None, [])  # closing plan: returns the pages, and reports what the last pass found
        return out
    except LostRankError:
        raise
    except BaseException as error:  # Ctrl-C, too: the others would wait for this rank
        if _LOST_RANK.search(str(error)) and isinstance(error, RuntimeError) and not isinstance(error, PiKVError):
            with talking("ran the model's own exchange"):  # says what to look for
                raise
        passing = any(c.batch is not None and c.batch.in_step for c in (cache, idle))
        if attachment.attached and (
            isinstance(error, PiKVError) or not passing
        ):  # else the others are in the pass, too
            lockstep.fail(error)
        cache.release()
        raise
    finally:
        for name in ("_get_stopping_criteria", "_has_unfinished_sequences"):
            model.__dict__.pop(name, None)
        for layer in attachment.layers.values():
            layer.pending = layer.running = None  # a pass that failed midway leaves them behind
        cache.idle = cache.generating = False
        idle.release()
        if cache.release_finished:
            cache.release()


def _unfinished(
    cache: PiKVCache, lockstep: Lockstep, this_peer_finished: Any, synced_gpus: bool, device: torch.device
) -> bool:
    """The check at the top of transformers' loop; a rank that is done makes idle passes from here on."""
    cache.idle, cache.generating = bool(this_peer_finished), True
    return lockstep.unfinished(cache.idle)


def _take_cache_argument(kwargs: dict[str, Any]) -> None:
    """Moves a cache to the name that this transformers has for it; both of its names are taken."""
    for name in ("past_key_values", "cache"):
        if name != CACHE and name in kwargs:
            given = kwargs.pop(name)
            if kwargs.get(CACHE) is not None and given is not None:
                raise UsageError("generate: past_key_values and cache are the same argument; pass one of them")
            kwargs[CACHE] = kwargs.get(CACHE) if given is None else given


def _check_call(attachment: Attachment, ids: Tensor | None, settings: Any, kwargs: dict[str, Any]) -> None:
    """Raises ValueError for what cannot work."""
    if kwargs.get("inputs_embeds") is not None:
        raise UsageError("generate: inputs_embeds are not supported; pass input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        got = f"a tensor of shape {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise UsageError(f"generate: pass input_ids of shape [batch, tokens], not {got}")
    if len(ids) and not ids.shape[1]:
        raise UsageError("generate: input_ids has no tokens; begin with at least one, e.g. bos_token_id")
    wanted = {key: getattr(settings, key, kwargs.get(key)) for key in _REFUSED}
    for key, (neutral, remedy) in _REFUSED.items():
        value = wanted[key]
        if value not in neutral:
            shown = type(value).__name__ if isinstance(value, nn.Module) else repr(value)
            raise UsageError(f"generate: {key} = {shown} is not supported: {remedy}")
    if kwargs.get("synced_gpus") is False and dist.is_initialized() and dist.get_world_size() > 1:
        raise UsageError("generate: synced_gpus=False would hang the other ranks when this one finishes; leave it out")
    own = kwargs.get(CACHE)
    if own is not None and not isinstance(own, PiKVCache):
        raise UsageError(
            f"generate: past_key_values is a {type(own).__name__}; use pikv_ds.new_cache(model), or detach first"
        )
    if own is not None and own.attachment is not attachment:
        raise UsageError(
            f"generate: past_key_values is not a cache of this {type(attachment.model).__name__}, or one from before "
            "PiKV was detached from it; make a new one: pikv_ds.new_cache(model)"
        )
    problem = attachment.other_attention(attachment.model)
    if problem is not None:
        raise UsageError(f"generate: {problem}")
    positions = kwargs.get("position_ids")
    if positions is not None and positions.dim() > 2:
        raise UsageError(f"generate: position_ids must be [batch, tokens], got {list(positions.shape)}")
    vocabulary = attachment.model.get_input_embeddings().weight.shape[0]
    if len(ids) and (int(ids.max()) >= vocabulary or int(ids.min()) < 0):
        raise UsageError(
            f"generate: input_ids must lie in [0, {vocabulary}), got {int(ids.min())} to {int(ids.max())}"
        )
    if (settings.num_return_sequences or 1) > 1 and not settings.do_sample:
        raise UsageError(
            f"generate: num_return_sequences = {settings.num_return_sequences} would be the same text several times; "
            "set do_sample=True"
        )
    limit = getattr(attachment.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    new = settings.max_new_tokens or 1
    if limit is not None and len(ids) and ids.shape[1] + new > limit:
        raise UsageError(
            f"generate: a prompt of {ids.shape[1]} tokens and {new} new ones exceed the model's context of {limit}; "
            "shorten the prompt or lower max_new_tokens"
        )


def _check_mask(mask: Tensor, ids: Tensor, seen: int) -> None:
    """Refuses rows that end in padding: the next token would follow a token that is none.

    Args:
        seen: columns that are in the cache.
    """
    if mask.dim() != 2 or len(mask) != len(ids):
        raise UsageError(f"generate: attention_mask must be [{len(ids)}, tokens], got {list(mask.shape)}")
    if mask.shape == ids.shape and len(ids) and ids.shape[1] <= seen:
        raise UsageError(
            f"generate: the cache has {seen} columns and input_ids {ids.shape[1]}: pass the whole text, with at least "
            "one new token"
        )
    ended = (mask[:, -1:] == 0).any(1).nonzero().flatten().tolist()
    if ended:
        raise UsageError(
            f"generate: row {ended[0]} ends in padding (attention_mask or pad_token_id); pad on the left: "
            'tokenizer.padding_side = "left"'
        )


def _check_chunks(ids: Tensor, mask: Tensor, settings: Any, kwargs: dict[str, Any]) -> None:
    """Refuses what cannot be cut into chunks of the prompt."""
    if mask.shape != ids.shape:
        raise UsageError(
            f"generate: attention_mask has {mask.shape[1]} columns and input_ids {ids.shape[1]}; with "
            "pikv.prefill_chunk_tokens pass the whole text, what is in the cache included"
        )
    positions = kwargs.get("position_ids")
    if positions is not None and positions.shape[-1] != ids.shape[1]:
        raise UsageError(
            f"generate: position_ids has {positions.shape[-1]} columns and input_ids {ids.shape[1]}; pass one for each"
        )
    if settings.output_hidden_states:
        raise UsageError(
            "generate: output_hidden_states would be the last chunk's only; leave it or pikv.prefill_chunk_tokens out"
        )
    for name in ("token_type_ids", "mm_token_type_ids"):
        if kwargs.get(name) is not None:
            raise UsageError(
                f"generate: {name} is not supported with pikv.prefill_chunk_tokens; leave one of them out"
            )


_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((None, 1), "beam search reorders the cache; use num_beams=1"),
    "use_cache": ((None, True), "without a cache there is nothing to shard; detach first"),
    "cache_implementation": ((None, "dynamic"), "the cache is PiKV's; detach first to use another"),
    "assistant_model": ((None,), "assisted decoding crops the cache; decode without an assistant"),
    "assistant_early_exit": ((None,), "assisted decoding crops the cache; leave it out"),
    "prompt_lookup_num_tokens": ((None,), "prompt lookup crops the cache; leave it out"),
    "guidance_scale": ((None, 1), "classifier-free guidance makes passes of its own; leave it out"),
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

    def __init__(self, criteria: StoppingCriteriaList, cache: PiKVCache, stopwatch: Stopwatch) -> None:
        super().__init__(criteria)
        self.cache, self.stopwatch = cache, stopwatch

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = super().__call__(input_ids, scores, **kwargs)
        self.stopwatch.token(done)
        if self.cache.release_finished and bool(done.any()):
            self.cache.release(done.nonzero().squeeze(1).tolist())
        return done


class Stopwatch:
    """Takes the time of each token of a call.

    Args:
        called: `time.perf_counter` when the call began.
        running: sequences of it.
    """

    def __init__(self, store: ExpertShardedKVCache, called: float, running: int) -> None:
        self._store, self._last = store, called
        self._running, self._finished, self._first = running, torch.zeros(running, dtype=torch.bool), True

    def token(self, done: Tensor) -> None:
        """Every sequence that was running has one more token.

        Args:
            done: bool ``[batch]``, of those that end with it; of others that have ended before, too.
        """
        now = time.perf_counter()
        latencies = self._store.first_token if self._first else self._store.between_tokens
        latencies.observe(now - self._last, self._running)
        self._finished |= done.cpu()
        self._running = len(done) - int(self._finished.sum())
        self._last, self._first = now, False


class Lockstep:
    """All ranks of the world in one generation loop.

    Replaces transformers' check at the top of its loop, one all-reduce over the world, by one that
    also tells when a rank has failed: its error reaches the others there instead of leaving them
    waiting. Two EP groups of a world are in step with each other by this alone.

    A group checks by itself first, so that a silent rank is an error of its own group after
    `timeout_s`; groups wait for each other as long as the world's process group does.
    """

    def __init__(self, store: ExpertShardedKVCache) -> None:
        self.store = store
        world = dist.get_world_size() if dist.is_initialized() else 1
        self.several = world > 1
        own = store.exchange
        self._groups = [own.group] if own.size > 1 else []
        if own.size < world:
            self._groups.append(dist.group.WORLD)
        self._plans = store.num_plans  # how many there will have been once this rank has kept what was agreed
        self._looping = False
        self._over = False  # nobody waits in the loop's check any more

    @property
    def owes_plan(self) -> bool:
        """Whether the others wait for this rank in a step plan, now or soon."""
        return self.store.num_plans < self._plans

    def agree(self, num_chunks: int, problem: Exception | None) -> int:
        """The most chunks of any rank; raises on every rank if one has a problem with its call."""
        if not self.several:
            if problem is not None:
                raise problem
            return num_chunks
        both = torch.tensor([num_chunks, int(problem is not None)], device=self.store.device)
        with talking("prepared a generation"):
            dist.all_reduce(both, op=dist.ReduceOp.MAX)
        most_chunks, failed = both.tolist()
        if failed:
            message = self._reasons(problem)
            if problem is None:
                raise PeerError(message)
            raise UsageError(message) from problem
        self._plans += most_chunks
        return most_chunks

    def unfinished(self, this_peer_finished: bool) -> bool:
        """Whether any rank goes on."""
        if not self.several:
            return not this_peer_finished
        going_on = self._check(not this_peer_finished, None)
        if self._looping or not going_on:  # the first round needs no pass, and the last plan closes the call
            self._plans += 1
        self._looping, self._over = True, not going_on
        return going_on

    def fail(self, error: BaseException) -> None:
        """Tells the others why this rank ends, where they wait for it: step plan first, then the loop's check."""
        if not self.several:
            return
        try:
            if self.owes_plan and not isinstance(error, PiKVError):  # that one has been raised by all of the group
                self.store.begin_step(None, [], error=_describe(error))
        except LostRankError:
            return
        except PiKVError:  # as on the others, which come to the check now
            pass
        if not self._over:
            with contextlib.suppress(PeerError):
                self._check(False, error)

    def _check(self, going_on: bool, failure: BaseException | None) -> bool:
        flags = torch.tensor([int(going_on), int(failure is not None)], device=self.store.device)
        with talking("waited for the next pass"):
            for group in self._groups:
                dist.all_reduce(flags, group=group)
        any_goes_on, failed = flags.tolist()
        if failed:
            self._over = True
            raise PeerError(self._reasons(failure))
        return bool(any_goes_on)

    @staticmethod
    def _reasons(reason: BaseException | None) -> str:
        texts: list[str | None] = [None] * dist.get_world_size()
        with talking("exchanged the reason of an error"):
            dist.all_gather_object(texts, None if reason is None else _describe(reason))
        return "; ".join(f"rank {r}: {t}" for r, t in enumerate(texts) if t)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _seen(kwargs: dict[str, Any]) -> int:
    cache = kwargs.get(CACHE)
    return 0 if cache is None else cache.get_seq_length()


def _idle_pass(attachment: Attachment, cache: PiKVCache) -> None:
    """A forward pass of one padding token that leaves nothing behind but serves the others."""
    cache.idle = True
    token = torch.zeros(1, 1, dtype=torch.long, device=attachment.model.device)
    with torch.no_grad():
        attachment.model(input_ids=token, use_cache=True, **{CACHE: cache})


def _serve_only(attachment: Attachment, cache: PiKVCache, passes: int, lockstep: Lockstep) -> None:
    """A rank without sequences: makes the others' passes until all are done."""
    if not lockstep.several:
        return
    for _ in range(passes):
        _idle_pass(attachment, cache)
    while lockstep.unfinished(True):
        if lockstep.owes_plan:
            _idle_pass(attachment, cache)


def _padding(ids: Tensor, settings: Any, kwargs: dict[str, Any]) -> Tensor:
    """The padding mask, found as `generate` finds it: padding tokens, unless they also end texts."""
    mask = kwargs.get("attention_mask")
    pads, ends = (_token_ids(getattr(settings, key)) for key in ("pad_token_id", "eos_token_id"))
    if mask is None and pads and pads[0] not in ends:
        return ids.ne(pads[0]).long()
    return torch.ones_like(ids) if mask is None else mask


def _token_ids(setting: Any) -> list[int]:
    """The tokens of a setting, which may be a number, a list or a tensor of such, or None."""
    return [] if setting is None else torch.as_tensor(setting).flatten().tolist()


def _prefill_chunks(
    attachment: Attachment, cache: PiKVCache, ids: Tensor, mask: Tensor, positions: Tensor | None, chunk: int
) -> None:
    """All chunks of the prompt but the last, which `generate` itself takes.

    They are counted from the end, where all rows end. So where a row is cut depends on its own length, and its
    tokens do not depend on how much its neighbours pad it.

    Args:
        positions: int ``[..., T]``, what the caller passed; None: counted over the mask.
    """
    if positions is None:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    start, width = cache.get_seq_length(), ids.shape[1]
    for end in reversed(range(width - chunk, start, -chunk)):
        with torch.no_grad():
            attachment.model(
                input_ids=ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[..., start:end],
                use_cache=True,
                logits_to_keep=1,
                **{CACHE: cache},
            )
        start = end
