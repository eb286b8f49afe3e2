"""A taped decode pass on two ranks: its collectives are replayed with its ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from harness import Ranks, ranks_fixture
from passes import LATENT, SHAPE
from test_tape import replayed
from test_transaction import Twin

from pikv_ds.core.exchange import Exchange, make_group

pytestmark = pytest.mark.distributed
two = ranks_fixture(2)


def taped(rank: int, latent: bool, rows: tuple[int, int], settings: dict[str, Any]) -> int:
    exchanges = [Exchange(make_group(dist.group.WORLD, 20)) for _ in range(2)]
    shape = LATENT if latent else SHAPE
    twins = [Twin(shape, 7 + rank, rows=rows[rank], exchange=x, capacity_tokens=4000, **settings) for x in exchanges]
    for twin in twins:
        twin.make([37, 16, 30][: rows[rank]])
    ops = replayed(*twins, rows=rows[rank])
    for exchange in exchanges:
        exchange.close()
    return ops


@pytest.mark.parametrize(
    ("latent", "settings"), [(False, {}), (False, {"codec": "int4"}), (True, {}), (False, {"placement": "balanced"})]
)
def test_a_taped_decode_pass_goes_on_for_many(two: Ranks, latent: bool, settings: dict[str, Any]) -> None:
    assert two.run(taped, latent=latent, rows=(3, 3), settings=settings) == [7, 7]


def test_ranks_with_fewer_rows_are_padded(two: Ranks) -> None:
    assert two.run(taped, latent=False, rows=(1, 3), settings={}) == [8, 7]
