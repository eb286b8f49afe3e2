"""Traces of page events on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks, ranks_fixture
from passes import SHAPE, Driver, make_cache

from pikv_ds import api
from pikv_ds.config import PiKVConfig
from pikv_ds.core.exchange import Exchange, make_group
from pikv_ds.core.trace import read
from pikv_ds.errors import PeerError
from pikv_ds.observe.metrics import rank_stats

pytestmark = pytest.mark.distributed
two = ranks_fixture(2)


def moving(rank: int, folder: str) -> dict[str, Any]:
    """Passes whose tokens choose two experts, so that pages move between the ranks."""
    exchange = Exchange(make_group(dist.group.WORLD, 20))
    eplb = {"name": "eplb", "every": 4, "moves": 3, "redundant": 0}
    cache = make_cache(exchange=exchange, placement=eplb, trace=folder)
    driver = Driver(cache, cache.new_batch(2), torch.Generator().manual_seed(rank), hot=2)
    driver.pass_of([61, 40 + 8 * rank])
    for _ in range(20):
        driver.step(1)
    assert cache.shard.trace is not None
    cache.shard.trace.close()
    exchange.close()
    return rank_stats(cache)


def test_traces_of_two_ranks(two: Ranks, tmp_path: Path) -> None:
    counted = two.run(moving, folder=str(tmp_path))
    told = read(tmp_path)
    assert [trace.rank for trace in told] == [0, 1]
    moved = sum(trace.freed["move"] for trace in told)
    assert moved == sum(c["moved_pages"] for c in counted) > 0
    for trace, c in zip(told, counted, strict=True):
        assert sum(trace.stored.values()) - sum(trace.freed.values()) == c["pages"]
        assert len(trace.seals) == c["seals"]
        assert {seal.owner for seal in trace.seals} == {0, 1}
    (tmp_path / "trace-rank0.jsonl").unlink()
    with pytest.raises(ValueError, match="belong together, but these are of ranks 1 of 2"):
        read(tmp_path)


def no_folder_on_one_rank(rank: int, folder: str) -> str:
    """All ranks are told that one cannot write."""
    exchange = Exchange(make_group(dist.group.WORLD, 20))
    settings = PiKVConfig(trace=folder if rank == 0 else f"{folder}/file")
    try:
        api.compare(exchange, settings, SHAPE)
    except PeerError as error:
        return str(error)
    finally:
        exchange.close()
    return "nothing"


def test_a_folder_that_one_rank_cannot_write(two: Ranks, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for message in two.run(no_folder_on_one_rank, folder=str(tmp_path)):
        assert "ranks 0 and 1 differ in trace" in message
        assert "File exists" in message
