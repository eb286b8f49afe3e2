"""Fixtures that several test files share."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch

from pikv_ds.ops import Ops, why_missing

BACKENDS = ["reference-cpu", "cpp-cpu"]
"""Backends and devices on which this machine can test the ops."""
if os.environ.get("TRITON_INTERPRET") == "1":
    BACKENDS.append("triton-cpu")
if torch.cuda.is_available():
    BACKENDS += ["reference-cuda", "cpp-cuda", "triton-cuda"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of each backend; tensors are made on its device."""
    name, device = request.param.split("-")
    if name != "reference" and (missing := why_missing(name, device)):
        pytest.skip(missing)
    with torch.device(device):
        yield name


@pytest.fixture
def ops(backend: str) -> Ops:
    """The ops of each backend."""
    return Ops(backend, torch.get_default_device().type)


@pytest.fixture(params=[name for name in BACKENDS if not name.startswith("reference")])
def fast_ops(request: pytest.FixtureRequest) -> Iterator[Ops]:
    """The ops of each backend that is compared with the reference."""
    name, device = request.param.split("-")
    if missing := why_missing(name, device):
        pytest.skip(missing)
    with torch.device(device):
        yield Ops(name, device)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator with new numbers in every run; the seed is printed where a test fails."""
    if "backend" in request.fixturenames:
        request.getfixturevalue("backend")  # its device comes first
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    return torch.Generator(torch.get_default_device()).manual_seed(seed)
