"""Passes that are broken off on two ranks: all undo them, whichever rank it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks, ranks_fixture
from passes import SHAPE
from test_transaction import PASSES, Broken, Twin, same, watched

from pikv_ds.core.exchange import Exchange, make_group
from pikv_ds.errors import PeerError

pytestmark = pytest.mark.distributed
two = ranks_fixture(2)
ON_BOTH = ["append_tokens", "tail_attention", "decode_attention", "merge_partials", "append_experts", "seal_pages"]
"""Ops that ranks with equal work call equally often, wherever their pages lie."""


def broken_alike(rank: int, kind: str, settings: dict[str, Any]) -> int:
    """Breaks a pass off at every op, on both ranks at once; how many there are."""
    exchanges = [Exchange(make_group(dist.group.WORLD, 20)) for _ in range(2)]
    calm, broken = (Twin(SHAPE, 3 + rank, exchange=exchange, **settings) for exchange in exchanges)
    ops = watched(broken.cache, ON_BOTH)
    before, new = PASSES[kind]
    for earlier in before:
        calm.make(earlier)
        broken.make(earlier)
    calm.cache.begin_step(None, [])
    broken.cache.begin_step(None, [])
    expected, calls = calm.make(new), 0
    while True:
        with ops.broken_after(calls):
            try:
                outs = broken.make(new)
                break
            except Broken:
                calls += 1
    assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(broken.make([1, 1]), calm.make([1, 1]), strict=True))
    broken.cache.check_integrity()
    assert same(broken.state(), calm.state())
    for exchange in exchanges:
        exchange.close()
    return calls


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize(
    "settings", [{}, {"retention": "h2o", "budget": {"name": "uniform", "tokens": 24}}, {"placement": "balanced"}]
)
def test_a_pass_broken_off_on_both_ranks_changes_nothing(two: Ranks, kind: str, settings: dict[str, Any]) -> None:
    assert min(two.run(broken_alike, kind=kind, settings=settings)) > SHAPE.num_layers


def broken_on_one(rank: int, kind: str) -> str:
    """Rank 1 breaks its pass off after the last exchange, when rank 0 has made it whole already."""
    exchanges = [Exchange(make_group(dist.group.WORLD, 20)) for _ in range(2)]
    calm, broken = (Twin(SHAPE, 3 + rank, exchange=exchange) for exchange in exchanges)
    before, new = PASSES[kind]
    for earlier in before:
        calm.make(earlier)
        broken.make(earlier)
    calm.cache.begin_step(None, [])
    broken.cache.begin_step(None, [])
    expected = calm.make(new)
    if rank == 1:
        close, broken.batch.close_layer = broken.batch.close_layer, fail  # type: ignore[method-assign]
        inputs = broken.inputs(new)
        broken.cache.begin_step(broken.batch, new)
        for layer, (query, key, value, experts) in enumerate(inputs):
            if layer == SHAPE.num_layers - 1:
                broken.cache.attend(broken.batch, layer, query, key, value, 0.3)
                with pytest.raises(Broken):
                    broken.cache.routed(broken.batch, layer, experts)
            else:
                broken.batch.close_layer = close  # type: ignore[method-assign]
                broken.cache.attend(broken.batch, layer, query, key, value, 0.3)
                broken.cache.routed(broken.batch, layer, experts if layer else None)
                broken.batch.close_layer = fail  # type: ignore[method-assign]
        broken.batch.close_layer = close  # type: ignore[method-assign]
    else:
        broken.make(new)
        broken.passes -= 1
    message = ""
    try:
        broken.cache.begin_step(broken.batch, [1, 1])
    except PeerError as error:
        message = str(error)
    outs = broken.make(new)
    assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(broken.make([1, 1]), calm.make([1, 1]), strict=True))
    assert same(broken.state(), calm.state())
    for exchange in exchanges:
        exchange.close()
    return message


def fail(layer: int) -> None:
    raise Broken


@pytest.mark.parametrize("kind", PASSES)
def test_a_pass_broken_off_on_one_rank_is_undone_on_both(two: Ranks, kind: str) -> None:
    for message in two.run(broken_on_one, kind=kind):
        assert "broken off on rank 1 by an error, and is undone on every rank" in message
