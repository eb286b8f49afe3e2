"""The sample of combinations that a run makes do with leaves out no value, and follows from its seed."""

from __future__ import annotations

import itertools
import random

import pytest
from sampling import sample

PRODUCT = [
    tuple(zip(("codec", "dtype", "size"), values, strict=True)) for values in itertools.product("abcde", "xyz", "12")
]


@pytest.mark.parametrize(("together", "most"), [(1, 6), (2, 19), (3, 30)])
def test_every_value_and_every_pair_stays(together: int, most: int) -> None:
    for seed in range(20):
        kept = sample(PRODUCT, together, random.Random(seed))
        for groups in itertools.combinations(range(3), together):
            found, wanted = ({tuple(PRODUCT[i][g] for g in groups) for i in of} for of in (kept, range(len(PRODUCT))))
            assert found == wanted
        assert len(kept) <= most


def test_what_is_alone_in_a_value_stays() -> None:
    assert sample([(("message", str(i)),) for i in range(7)], 1, random.Random(0)) == set(range(7))
    assert sample([(("message", "a"), ("ops", "cpp")), (("message", "b"), ("ops", "cpp"))], 5, random.Random(0)) == {
        0,
        1,
    }


def test_a_seed_is_a_sample() -> None:
    samples = [frozenset(sample(PRODUCT, 1, random.Random(f"{seed} tests/x.py::test"))) for seed in (*range(30), 7)]
    assert samples[-1] == samples[7]
    assert len(set(samples)) > 5
