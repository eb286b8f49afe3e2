"""Fixtures that several test files share."""

from __future__ import annotations

import pytest
import torch

from pikv_ds.ops import Ops, why_missing


@pytest.fixture
def rng() -> torch.Generator:
    """A generator with the same numbers in every run."""
    return torch.Generator().manual_seed(20260)


@pytest.fixture(params=["reference", "cpp"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend of the ops that this machine can run."""
    if request.param == "cpp" and (missing := why_missing("cpp", "cpu")):
        pytest.skip(missing)
    return request.param


@pytest.fixture
def ops(backend: str) -> Ops:
    """The ops of each backend."""
    return Ops(backend)
