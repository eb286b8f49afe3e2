"""What the tests run on every rank: models, engines, and `generate` beside the unsharded model.

Every function here takes the rank first (see `harness`) and returns plain data for the test to
judge. All ranks build the same model from the same seed, and their own prompts.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tiny
import torch
import torch.distributed as dist
from passes import pages_of
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import pikv_ds
from pikv_ds.api import attachment_of

TOLERANCE = 1e-5
"""Largest difference of logits, relative to the largest logit: float32 sums in another order."""


@dataclass(frozen=True)
class Work:
    """What one rank generates."""

    rows: int = 2
    length: int = 40
    """Columns of the prompt."""
    new: int = 12
    padded: bool = False
    """Whether rows are left-padded by different amounts (the first row not at all)."""

    unmasked: bool = False
    """Whether padding is to be found by its token, without an attention mask."""

    def ids(self, seed: int) -> Tensor:
        ids = tiny.prompt(self.rows, self.length, seed).clamp(min=1)
        mask = self.mask()
        return ids if mask is None else ids * mask

    def mask(self) -> Tensor | None:
        if not self.padded:
            return None
        padding = torch.tensor([(7 * row) % self.length for row in range(self.rows)])
        return (torch.arange(self.length) >= padding[:, None]).long()


USUAL = (Work(2, 40, 12), Work(2, 40, 12))
"""What two ranks generate."""
UNEVEN = (Work(1, 30, 20), Work(3, 57, 9))


def settings(pikv: Mapping[str, Any], ep: int | str = "auto") -> dict[str, Any]:
    """DeepSpeed's configuration with expert parallelism over ``ep`` ranks."""
    ours = {"page_size": 8, "debug": True, "timeout_s": 20, **pikv}
    return {"expert_parallel": {"enabled": True, "autoep_size": ep}, "pikv": ours}


def build(kind: str, pikv: Mapping[str, Any], ep: int | str = "auto", **model: Any) -> tuple[Any, PreTrainedModel]:
    """An engine with PiKV, and the same model unsharded."""
    whole = tiny.MODELS[kind](**model)
    reference = copy.deepcopy(whole)
    return pikv_ds.initialize(whole, settings(pikv, ep)), reference


def attached(kind: str, pikv: Mapping[str, Any], **model: Any) -> PreTrainedModel:
    """A model with all its experts on every rank, that shares its KV over the world."""
    whole = tiny.MODELS[kind](**model)
    pikv_ds.attach(whole, settings(pikv)["pikv"], ep_group=world_group())
    return whole


def world_group() -> dist.ProcessGroup | None:
    """All ranks; None in a job of one process."""
    return dist.group.WORLD if dist.is_initialized() else None


def store_of(model: Any) -> pikv_ds.ExpertShardedKVCache:
    """The rank's cache under a model or engine."""
    return attachment_of(model).store


def module_of(model: Any) -> Any:
    """The transformers model in an engine."""
    return model.module if hasattr(model, "module") else model


def options(**changes: Any) -> dict[str, Any]:
    """Arguments of a greedy `generate` that returns its logits."""
    greedy = {
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    return {**greedy, **changes}


def difference(ours: Sequence[Tensor] | Tensor, theirs: Sequence[Tensor] | Tensor) -> float:
    """Largest difference of logits, relative to the largest logit of the reference."""
    a, b = (x if isinstance(x, Tensor) else torch.stack(list(x)) for x in (ours, theirs))
    return float((a - b).abs().max() / b.abs().max())


def side_by_side(
    model: Any, reference: PreTrainedModel, work: Work, seed: int, rng: int | None = None, **changes: Any
) -> dict[str, Any]:
    """Generates with both models and compares tokens and logits.

    Args:
        seed: of the prompt.
        rng: of the sampling; both models start with it.
    """
    arguments = options(max_new_tokens=work.new, **changes)
    if work.padded and not work.unmasked:
        arguments["attention_mask"] = work.mask()
    outputs = []
    for generator in (module_of(model), reference):
        if rng is not None:
            torch.manual_seed(rng)
        if generator is reference and work.rows == 0:
            continue
        arguments.pop("synced_gpus", None)
        outputs.append(generator.generate(work.ids(seed), **arguments))
    if work.rows == 0:
        tokens = outputs[0] if isinstance(outputs[0], Tensor) else outputs[0].sequences
        return {"same": tokens.shape[0] == 0, "error": 0.0, "tokens": tokens.tolist()}
    ours, theirs = outputs
    return {
        "same": torch.equal(ours.sequences, theirs.sequences),
        "error": difference(ours.logits, theirs.logits),
        "tokens": ours.sequences.tolist(),
    }


def parity(
    rank: int,
    kind: str,
    works: Sequence[Work],
    pikv: Mapping[str, Any] | None = None,
    ep: int | str = "auto",
    calls: int = 1,
    rng: int | None = None,
    model: Mapping[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Tokens and logits of an expert-parallel model beside the unsharded one, and the figures."""
    engine, reference = build(kind, pikv or {}, ep, **(model or {}))
    results = [
        side_by_side(engine, reference, works[rank], 100 * call + rank, rng, **changes) for call in range(calls)
    ]
    return {
        "same": all(r["same"] for r in results),
        "error": max(r["error"] for r in results),
        "tokens": [r["tokens"] for r in results],
        "stats": pikv_ds.stats(engine),
    }


def assert_parity(results: Sequence[Mapping[str, Any]], tolerance: float = TOLERANCE) -> None:
    """Every rank generated the unsharded model's tokens from its logits, over several ranks."""
    for rank, result in enumerate(results):
        assert result["error"] <= tolerance, f"rank {rank}: logits differ by {result['error']:.2g}"
        assert result["same"], f"rank {rank}: other tokens than the unsharded model"
    figures = results[0]["stats"]
    assert figures["page_wire_bytes"] > 0, "no page left its rank: nothing was sharded"
    assert figures["seals"] > 0


# -- states of the cache, to be judged over all ranks -------------------------------------------


def snapshot(store: pikv_ds.ExpertShardedKVCache) -> dict[str, Any]:
    """What a rank holds and knows after a forward pass."""
    staged = [
        (row, unit, number)
        for p in store.sender.staged
        for row, unit, number in zip(p.rows.tolist(), p.units.tolist(), p.numbers.tolist(), strict=True)
    ]
    ledger, layers = store.ledger, range(store.shape.num_layers)
    return {
        "step": store.num_steps,
        "table": {
            (int(ledger.source[row]), row): [[page for page, _ in pages_of(store, row, layer)] for layer in layers]
            for row in ledger.rows.tolist()
        },
        "own": [
            {"id": b.rows[row], "length": b.lengths[row], "open": b.open_tokens(row)}
            for b in store._batches
            for row in range(len(b))
            if b.alive[row]
        ],
        "staged": staged,
        "kv_bytes": store.kv_bytes,
        "storage": storage_bytes(store),
    }


def storage_bytes(store: pikv_ds.ExpertShardedKVCache) -> int:
    """Bytes of all storages in which keys and values lie, each counted once."""
    tensors = [slab for slab in store.pool.pages[0].tensors if slab is not None]
    for batch in store._batches:
        for tail in batch.tails:
            if tail is not None:
                tensors += [t for t in (tail.keys, tail.values, tail.experts) if t is not None]
        tensors += [t for rows in batch.fresh.values() for pair in rows for t in pair]
        tensors += [t for _, tail in batch._overwritten for t in tail if t is not None]
    tensors += [payload for pages in store.sender.staged for payload in pages.payloads.values()]
    if store.sender._in_flight is not None:
        flight = store.sender._in_flight.flight
        tensors += [flight.received, flight._sent]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def watch(store: pikv_ds.ExpertShardedKVCache) -> list[dict[str, Any]]:
    """A list to which the store adds a snapshot after every forward pass (needs debug mode)."""
    assert store.config.debug
    taken: list[dict[str, Any]] = []
    check = store.check_integrity

    def check_and_take() -> None:
        check()
        taken.append(snapshot(store))

    store.check_integrity = check_and_take  # type: ignore[method-assign]
    return taken


def assert_invariants(
    ranks: Sequence[Sequence[Mapping[str, Any]]], num_layers: int, num_experts: int, page_size: int
) -> int:
    """Every page exactly once, every rank within its bound, no token lost: after every pass.

    Args:
        ranks: snapshots of each rank of one group; those of the same pass belong together.

    Returns:
        How many (pass, sequence, layer) were checked.
    """
    checked = 0
    by_step = [{s["step"]: s for s in snapshots} for snapshots in ranks]
    for step in sorted(set.intersection(*(set(s) for s in by_step))):
        now = [s[step] for s in by_step]
        for source, mine in enumerate(now):
            for sequence in mine["own"]:
                for layer in range(num_layers):
                    where = f"pass {step}, sequence {sequence['id']} of rank {source}, layer {layer}"
                    _check_sequence(now, source, sequence, layer, num_experts, page_size, where)
                    checked += 1
    return checked


def _check_sequence(
    now: Sequence[Mapping[str, Any]],
    source: int,
    sequence: Mapping[str, Any],
    layer: int,
    num_experts: int,
    page_size: int,
    where: str,
) -> None:
    key, length = (source, sequence["id"]), sequence["length"]
    empty = [[]] * (layer + 1)
    held = [list(rank["table"].get(key, empty)[layer]) for rank in now]
    waiting = [page for s, la, page in now[source]["staged"] if (s, la) == (sequence["id"], layer)]
    pages = sorted([page for rank in held for page in rank] + waiting)
    assert pages == list(range(length // page_size)), f"{where}: pages {pages} of {length} tokens"
    assert len(pages) * page_size + sequence["open"] == length, f"{where}: tokens are missing"
    bound = -(-length // len(now)) - (-length // num_experts) + page_size
    for rank, mine in enumerate(held):
        tokens = len(mine) * page_size
        if rank == source:
            tokens += len(waiting) * page_size + sequence["open"]
        assert tokens <= bound, f"{where}: rank {rank} holds {tokens} tokens, bound {bound}"


def rig_router(model: PreTrainedModel, share: float = 0.9) -> None:
    """Makes the first expert the first choice of ``share`` of the vocabulary at every layer.

    One channel of the residual stream says it: far above the rest, with the sign of the token.
    """
    chosen = torch.arange(tiny.VOCAB) < share * tiny.VOCAB
    model.get_input_embeddings().weight[:, 0] = torch.where(chosen, 8.0, -8.0)
    model.lm_head.weight[~chosen, 0] = -8.0  # nor are the others generated
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0  # nothing else writes into the channel
        for parameter in layer.mlp.experts.parameters():
            if parameter.shape[-2] == model.config.hidden_size:
                parameter[..., 0, :] = 0.0
        layer.mlp.gate.weight[0] = 0.0
        layer.mlp.gate.weight[0, 0] = 20.0


def generate_watched(
    rank: int,
    works: Sequence[Work],
    pikv: Mapping[str, Any],
    rigged: bool = False,
    ep: int | str = "auto",
    **model: Any,
) -> dict[str, Any]:
    """Generates with a router that sends almost everything to one expert; takes every state."""
    whole = tiny.mixtral(**model)
    if rigged:
        rig_router(whole)
    reference = copy.deepcopy(whole)
    engine = pikv_ds.initialize(whole, settings(pikv, ep))
    first, chosen = 0, 0
    taken = watch(store_of(engine))

    def count(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal first, chosen
        first += int((output[1] == 0).any(1).sum())
        chosen += len(output[1])

    for module in engine.module.modules():
        if type(module).__name__ == "AutoEPMoELayer":
            module.router.register_forward_hook(count)
    result = side_by_side(engine, reference, works[rank], rank)
    figures = pikv_ds.stats(engine)
    return {**result, "share": first / chosen, "taken": taken, "stats": figures}


def teacher_forced(model: Any, ids: Tensor, pieces: Sequence[int], cache: Any = None) -> Tensor:
    """Logits ``[B, T, V]`` of a text that goes through the model in pieces."""
    cache = pikv_ds.new_cache(model) if cache is None else cache
    logits, start = [], 0
    with torch.no_grad():
        for piece in pieces:
            out = module_of(model)(input_ids=ids[:, start : start + piece], past_key_values=cache, use_cache=True)
            logits.append(out.logits)
            start += piece
    return torch.cat(logits, dim=1)


class Collector(BaseStreamer):
    """A streamer that keeps the tokens it is given."""

    def __init__(self, at: int | None = None, action: Callable[[], None] | None = None) -> None:
        self.tokens: list[int] = []
        self.ended = False
        self.at, self.action = at, action

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()
        if self.action is not None and len(self.tokens) == self.at:
            self.action()

    def end(self) -> None:
        self.ended = True


@dataclass
class Raised:
    """What a call raised, for the test to judge."""

    kind: str = ""
    """Name of the exception's class, empty if none was raised."""
    message: str = ""
    seconds: float = 0.0


@contextlib.contextmanager
def catching() -> Iterator[Raised]:
    """Notes what its body raises."""
    raised, start = Raised(), time.monotonic()
    try:
        yield raised
    except Exception as error:
        raised.kind, raised.message = type(error).__name__, str(error)
    raised.seconds = time.monotonic() - start


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that an attachment could leave behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "state": list(model.state_dict()),
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "hooks": {n: [len(getattr(m, h)) for h in hooks] for n, m in model.named_modules()},
        "implementation": model.config._attn_implementation,
        "instances": {n: m.__dict__.get("forward") is None for n, m in model.named_modules()},
    }
