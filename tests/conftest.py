"""Fixtures that several test files share."""

from __future__ import annotations

import os

import pytest
import torch

from pikv_ds.ops import Ops, why_missing


@pytest.fixture
def rng() -> torch.Generator:
    """A generator with the same numbers in every run."""
    return torch.Generator().manual_seed(20260)


BACKENDS = ["reference", "cpp"]
if os.environ.get("TRITON_INTERPRET") == "1":
    BACKENDS.append("triton")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend of the ops that this machine can run."""
    if request.param != "reference" and (missing := why_missing(request.param, "cpu")):
        pytest.skip(missing)
    return request.param


@pytest.fixture
def ops(backend: str) -> Ops:
    """The ops of each backend."""
    return Ops(backend)
