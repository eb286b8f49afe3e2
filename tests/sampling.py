"""Few of the combinations of a test's parameters that hold every value, or every pair of values."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence


def sample(cases: Sequence[tuple[tuple[str, str], ...]], together: int, choose: random.Random) -> set[int]:
    """Numbers of cases in which all values that occur in any, or all groups of `together` values, occur.

    Args:
        cases: each as pairs of a parameter and its value.
    """
    groups = [set(itertools.combinations(case, min(together, len(case)))) for case in cases]
    order = choose.sample(range(len(cases)), len(cases))
    missing, kept = set().union(*groups), set()
    while missing:
        best = max(order, key=lambda i: len(groups[i] & missing))
        kept.add(best)
        missing -= groups[best]
    return kept
