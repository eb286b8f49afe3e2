"""A pass that is broken off changes nothing: at any op, for every kind of pass; made again it gives the same bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from passes import LATENT, SHAPE, make_cache
from torch import Tensor

from pikv_ds.core.cache import ExpertShardedKVCache
from pikv_ds.core.sequences import SequenceBatch, Tails
from pikv_ds.core.shape import ModelShape
from pikv_ds.errors import PiKVError
from pikv_ds.ops import OPS


class Broken(Exception):
    """What breaks passes off here."""


class Ops:
    """The ops of a cache, of which one call raises; those whose names are not given never do."""

    def __init__(self, real: Any, names: Sequence[str] = OPS) -> None:
        self.left: int | None = None
        for name in OPS:
            op = getattr(real, name)
            setattr(self, name, self._counted(op) if name in names else op)
        self.implementation = real.implementation

    def _counted(self, op: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.left is not None:
                if self.left == 0:
                    raise Broken
                self.left -= 1
            return op(*args, **kwargs)

        return call

    @contextmanager
    def broken_after(self, calls: int | None) -> Iterator[None]:
        """The op after so many calls raises."""
        self.left = calls
        try:
            yield
        finally:
            self.left = None


def watched(cache: ExpertShardedKVCache, names: Sequence[str] = OPS) -> Ops:
    """Puts `Ops` into a cache; all formats share them."""
    ops = Ops(cache.formats[0].ops, names)
    for page_format in cache.formats:
        object.__setattr__(page_format, "ops", ops)
    cache.ops = cache.attention.ops = ops  # type: ignore[assignment]
    return ops


class Twin:
    """A cache with a batch, and the inputs of its passes, which follow from a seed."""

    def __init__(self, shape: ModelShape, seed: int, rows: int = 2, **settings: Any) -> None:
        torch.manual_seed(0)
        self.cache = make_cache(shape, debug=True, **settings)
        self.shape, self.seed = shape, seed
        self.batch: SequenceBatch = self.cache.new_batch(rows)
        self.passes = 0

    def inputs(self, new: list[int]) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor]]:
        """Query, key, value and experts of every layer."""
        rng = torch.Generator().manual_seed(self.seed + self.passes)
        num, shape = sum(new), self.shape
        out = []
        for _ in range(shape.num_layers):
            query = torch.randn(num, shape.num_heads, shape.head_dim, generator=rng)
            key, value = torch.randn(2, num, shape.num_kv_heads, shape.head_dim, generator=rng)
            experts = torch.randint(shape.num_experts, (num, 2), generator=rng)
            out.append((query, key, None if shape.latent_dim else value, experts))
        return out

    def make(self, new: list[int]) -> list[Tensor]:
        """One pass; its outputs."""
        outs = []
        self.cache.begin_step(self.batch, new)
        for layer, (query, key, value, experts) in enumerate(self.inputs(new)):
            outs.append(self.cache.attend(self.batch, layer, query, key, value, 0.3))
            self.cache.routed(self.batch, layer, experts if layer else None)
        self.passes += 1
        return outs

    def state(self) -> dict[str, Any]:
        """What a pass may change, as far as it can be compared."""
        cache, batch = self.cache, self.batch
        ledger = cache.ledger
        units = np.arange(cache.num_units)
        pages = {
            (row, f): [x.tolist() for x in cache.table.entries(np.full(len(units), row), units, f)[:2]]
            for row in ledger.rows.tolist()
            for f in range(cache.table.num_formats)
        }
        tails = [
            x[..., : batch.open_tokens(i), :].clone()
            for i in range(len(batch))
            for tail in batch.tails
            if tail is not None
            for x in (tail.keys[i], tail.experts[i] if tail.experts is not None else None)
            if x is not None
        ]
        return {
            "lengths": (batch.lengths, batch.sealed, ledger.lengths.tolist(), batch.dropped.tolist()),
            "pages": (pages, ledger.pages.tolist(), ledger.demoted.tolist(), ledger.totals.tolist()),
            "used": (cache.pool.num_used, cache.stored_tokens),
            "tails": tails,
            "counters": [dict(cache.sender.counters), dict(cache.evictor.counters), dict(cache.attention.counters)],
            "steps": cache.num_steps,
        }


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"codec": "int4", "lookup": {"name": "quest", "budget": 0.5}},
    {"lookup": {"name": "cache_aware", "budget": 0.5, "audit_every": 2}},
    {"retention": "h2o", "budget": {"name": "uniform", "tokens": 24}},
    {"retention": "snap", "budget": {"name": "ada", "prompt": 0.5}},
    {"retention": "h2o", "budget": {"name": "uniform", "tokens": 24}, "demote": {"name": "int4"}},
    {"codec": {"name": "per_layer", "layers": {"0": {"name": "int8"}}, "default": {"name": "none"}}},
    {"placement": "balanced"},
]
PASSES = {
    "prompts": ([], [21, 9]),
    "chunks": ([[21, 9]], [20, 13]),
    "a prompt beside a token": ([[21, 0]], [1, 30]),
    "a prompt beside a token that fills a page": ([[23, 0]], [1, 30]),
    "tokens that fill a page": ([[23, 15]], [1, 1]),
    "a token": ([[20, 9]], [1, 1]),
}


@pytest.mark.sampled
@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("settings", [*SETTINGS, "latent"], ids=str)
def test_a_pass_broken_off_at_any_op_changes_nothing(settings: dict[str, Any] | str, kind: str) -> None:
    shape, own = (LATENT, {}) if isinstance(settings, str) else (SHAPE, settings)
    before, new = PASSES[kind]
    calm, broken = Twin(shape, 3, **own), Twin(shape, 3, **own)
    ops = watched(broken.cache)
    for earlier in before:
        calm.make(earlier)
        broken.make(earlier)
    if before:  # what the last pass has left to do is done by the next plan, whether that pass stands or not
        calm.cache.begin_step(None, [])
        broken.cache.begin_step(None, [])
    expected = calm.make(new)
    calls = 0
    while True:
        assert calls < 300
        with ops.broken_after(calls):
            try:
                outs = broken.make(new)
                break
            except Broken:
                calls += 1
        assert broken.cache.broken_off is broken.batch or broken.cache._transaction is None
    assert calls > shape.num_layers
    assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))
    assert same(broken.state(), calm.state())
    for _ in range(9):  # and so it goes on, pages filling up in between
        assert all(torch.equal(a, b) for a, b in zip(broken.make([1, 1]), calm.make([1, 1]), strict=True))
    broken.cache.check_integrity()
    assert same(broken.state(), calm.state())


def test_a_pass_without_all_of_its_layers_is_made_again() -> None:
    calm, broken = Twin(SHAPE, 5), Twin(SHAPE, 5)
    for twin in (calm, broken):
        twin.make([19, 8])
    query, key, value, _ = broken.inputs([1, 1])[0]
    for _ in range(2):
        broken.cache.begin_step(broken.batch, [1, 1])
        broken.cache.attend(broken.batch, 0, query, key, value, 0.3)
        broken.cache.routed(broken.batch, 0, None)
        assert broken.cache.broken_off is broken.batch
        assert broken.batch.first_open_layer == 1
    for _ in range(12):
        assert all(torch.equal(a, b) for a, b in zip(broken.make([1, 1]), calm.make([1, 1]), strict=True))
    assert same(broken.state(), calm.state())


def test_other_tokens_may_follow_a_pass_that_was_broken_off() -> None:
    """Nothing of it is left, not even what was not finite."""
    calm, broken = Twin(SHAPE, 5), Twin(SHAPE, 5)
    calm.make([19, 8])
    broken.make([19, 8])
    query, key, value, _ = broken.inputs([30, 1])[0]
    broken.cache.begin_step(broken.batch, [30, 1])
    broken.cache.attend(broken.batch, 0, query, key * torch.nan, value, 0.3)
    for _ in range(6):
        assert all(torch.equal(a, b) for a, b in zip(broken.make([1, 7]), calm.make([1, 7]), strict=True))
    assert same(broken.state(), calm.state())


def test_a_batch_may_be_released_after_a_pass_that_was_broken_off() -> None:
    twin = Twin(SHAPE, 5)
    twin.make([40, 8])
    query, key, value, experts = twin.inputs([30, 1])[0]
    twin.cache.begin_step(twin.batch, [30, 1])
    twin.cache.attend(twin.batch, 0, query, key, value, 0.3)
    twin.cache.routed(twin.batch, 0, experts)
    twin.cache.release(twin.batch)
    twin.cache.begin_step(None, [])
    assert (twin.cache.pool.num_used, twin.cache.stored_tokens, twin.cache.sender.nbytes) == (0, 0, 0)
    assert twin.cache.kv_bytes == twin.cache.pool.slab_pages * twin.cache.layout.page_bytes  # that of the null page
    twin.cache.check_integrity()


def test_an_error_of_the_plan_leaves_the_pass_before_it() -> None:
    calm, twin = Twin(SHAPE, 5), Twin(SHAPE, 5)
    calm.make([19, 8])
    twin.make([19, 8])
    with pytest.raises(PiKVError, match="the batch has 3"):
        twin.cache.begin_step(twin.batch, [0, 0], error="the batch has 3")
    for _ in range(6):
        assert all(torch.equal(a, b) for a, b in zip(twin.make([1, 1]), calm.make([1, 1]), strict=True))


def test_memory_that_ends_where_the_last_layer_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of chunks goes into the tails at the very end; an error there breaks the pass off, too."""
    calm, broken = Twin(SHAPE, 5), Twin(SHAPE, 5)
    for twin in (calm, broken):
        twin.make([19, 8])
    expected = calm.make([20, 13])
    with monkeypatch.context() as patch:
        patch.setattr(Tails, "whole", raises)
        with pytest.raises(Broken):
            broken.make([20, 13])
    assert broken.cache.broken_off is broken.batch
    assert all(torch.equal(a, b) for a, b in zip(broken.make([20, 13]), expected, strict=True))
    assert same(broken.state(), calm.state())


def raises(*args: Any) -> Any:
    raise Broken


def test_a_watcher_that_raises_breaks_the_pass_off() -> None:
    calm, broken = Twin(SHAPE, 5), Twin(SHAPE, 5)
    for twin in (calm, broken):
        twin.make([19, 8])
    broken.cache.watchers.append(raises)
    with pytest.raises(Broken):
        broken.make([1, 1])
    broken.cache.watchers.clear()
    for _ in range(12):
        assert all(torch.equal(a, b) for a, b in zip(broken.make([1, 1]), calm.make([1, 1]), strict=True))
    assert same(broken.state(), calm.state())


def test_an_error_within_a_plan_that_stands_is_told_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = Twin(SHAPE, 5)
    twin.make([19, 8])
    with monkeypatch.context() as patch:
        patch.setattr(twin.cache.evictor, "evict", raises)
        with pytest.raises(Broken):
            twin.make([1, 1])
    for _ in range(2):
        with pytest.raises(PiKVError, match="an error came between a step plan and its pass"):
            twin.make([1, 1])


def test_an_error_after_the_last_layer_undoes_the_pass() -> None:
    calm, twin = Twin(SHAPE, 5), Twin(SHAPE, 5)
    calm.make([19, 8])
    twin.make([19, 8])
    for new in ([20, 13], [1, 1]):
        twin.make(new)
        twin.passes -= 1
        twin.cache.fail_pass()
        assert twin.cache.broken_off is twin.batch
        assert all(torch.equal(a, b) for a, b in zip(twin.make(new), calm.make(new), strict=True))
    assert same(twin.state(), calm.state())


def test_what_a_released_sequence_has_dropped_does_not_come_back() -> None:
    twin = Twin(SHAPE, 5, retention="snap", budget={"name": "uniform", "prompt": 0.5})
    twin.make([64, 64])
    twin.cache.release(twin.batch, [0])
    assert twin.cache.admit(twin.batch) == 0
    twin.cache.fail_pass()
    twin.cache._undo()
    assert twin.batch.lengths == [0, 0]
    assert not twin.batch.dropped[:, 0].any()


def test_layers_may_choose_different_numbers_of_experts() -> None:
    twin = Twin(SHAPE, 5)
    rng = torch.Generator().manual_seed(1)
    for new in ([19, 8], *[[1, 1]] * 9):
        twin.cache.begin_step(twin.batch, new)
        for layer, (query, key, value, _) in enumerate(twin.inputs(new)):
            twin.cache.attend(twin.batch, layer, query, key, value, 0.3)
            chosen = torch.randint(SHAPE.num_experts, (sum(new), 1 + layer), generator=rng)
            twin.cache.routed(twin.batch, layer, chosen)
    twin.cache.begin_step(None, [])
    twin.cache.check_integrity()
    assert twin.batch.lengths == [28, 17]
    assert twin.cache.sender.counters["seals"] == (3 + 2) * SHAPE.num_layers
