"""Numbers of ranks that are no power of two, and eight of them."""

from __future__ import annotations

import cases
import pytest
from cases import Work
from harness import Ranks

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("size", [3, 8])
def test_equals_unsharded_model_and_keeps_the_invariants(size: int) -> None:
    ranks = Ranks(size)
    num_experts = {3: 6, 8: 8}[size]
    works = [Work(rank % 3, 25 + 9 * rank, 8 + rank % 4) for rank in range(size)]
    try:
        results = ranks.run(cases.generate_watched, works=works, pikv={}, num_experts=num_experts, head_dim=24)
    finally:
        ranks.close()
    cases.assert_parity(results)
    assert [r["stats"]["num_ranks"] for r in results] == [size] * size
    assert cases.assert_invariants([r["taken"] for r in results], 2, num_experts, 8) >= 60
    for result in results:
        assert all(state["kv_bytes"] == state["storage"] for state in result["taken"])
