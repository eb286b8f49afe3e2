"""Fixtures that several test files share, and the sample of combinations that a run makes do with."""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Iterator

# OpenMP's threads spin when they have nothing to do, and two workers have more threads than there are cores: that took
# three quarters of their time. Read when torch is loaded; processes that tests start inherit it.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import process_groups
import pytest
import torch
from sampling import sample

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


@pytest.fixture(scope="module", autouse=True)
def no_groups_are_left() -> Iterator[None]:
    """What a file's tests have made in this process goes with them."""
    yield
    process_groups.destroy_all_but_the_world()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator with new numbers in every run; the seed is printed where a test fails."""
    if "backend" in request.fixturenames:
        request.getfixturevalue("backend")  # its device comes first
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


# -- a sample of the combinations ---------------------------------------------------------------
#
# `@pytest.mark.sampled` says that a test's parameters multiply. Of its cases a run takes few that hold every value of
# every parameter at least once, `sampled(together=2)` every pair of values, and `sampled(few=1)` so many cases only,
# where each costs a minute. Which ones follows from a seed.

SEED, LONG = "PIKV_TEST_SEED", "PIKV_TEST_LONG"


def pytest_configure(config: pytest.Config) -> None:
    """In the environment, so that xdist's workers, and a pytest that a test starts, choose the same cases."""
    os.environ.setdefault(SEED, str(random.SystemRandom().getrandbits(32)))


def pytest_report_header(config: pytest.Config) -> str:
    return "combinations: " + ("all" if all_wanted(config) else f"a sample, {SEED}={os.environ[SEED]}")


LONG_FILES = (
    "test_newest_transformers.py",
    "test_policy_table.py",
    "test_triton.py",
    "test_launchers.py",
    "test_cuda_emulated.py",
    "test_latent.py",
    "test_patch.py",
    "test_server.py",
    "test_convert.py",
)
"""They come first, the longest in front: a worker that begins one when the others have ended makes them wait."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (*LONG_FILES, item.path.name).index(item.path.name))
    if all_wanted(config):
        return
    tests: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("sampled") and hasattr(item, "callspec"):
            tests[item.nodeid.partition("[")[0]].append(item)
    left_out: set[pytest.Item] = set()
    for name, cases in tests.items():
        marker = cases[0].get_closest_marker("sampled")
        values = [tuple((key, repr(value)) for key, value in case.callspec.params.items()) for case in cases]
        choose, few = random.Random(f"{os.environ[SEED]} {name}"), marker.kwargs.get("few")
        if few is not None:
            kept = set(choose.sample(range(len(cases)), min(few, len(cases))))
        else:
            kept = sample(values, marker.kwargs.get("together", 1), choose)
        left_out |= {case for i, case in enumerate(cases) if i not in kept}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def all_wanted(config: pytest.Config) -> bool:
    """Whoever names tests (`file::test`, `-k`, `--lf`) wants all of their cases."""
    named = any("::" in argument for argument in config.args)
    return os.environ.get(LONG) == "1" or named or bool(config.option.keyword) or bool(config.getoption("lf", False))
