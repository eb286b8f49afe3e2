"""A decode pass as a graph would hold it: the ops of one pass are taped and replayed without the layers' Python.

What the ops read and write must then lie where it lay in the taped pass, and nothing between the step plan and the
last layer may come from the host.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from passes import LATENT, SHAPE
from test_transaction import Twin, same
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PASSES = 100


class Tape(TorchDispatchMode):
    """Keeps the ops that torch dispatches, with their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        assert "_local_scalar_dense" not in name, "the host reads from the device"
        assert name not in ("aten.lift_fresh.default", "aten._to_copy.default"), f"{name} makes a tensor of host data"
        if not func.is_view and ".empty" not in name and ".new_empty" not in name:
            self.ops.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Runs the ops again on the same tensors."""
        for func, args, kwargs, out in self.ops:
            again = func(*args, **kwargs)
            works = again if isinstance(again, tuple | list) else [again]
            for before, after in zip(out if isinstance(out, tuple | list) else [out], works, strict=True):
                if isinstance(after, torch.ScriptObject):
                    torch._C._distributed_c10d.Work.unbox(after).wait()
                elif isinstance(after, Tensor) and after.data_ptr() != before.data_ptr():
                    before.copy_(after)


def layers(twin: Twin, inputs: list[tuple[Tensor, Tensor, Tensor | None, Tensor]]) -> list[Tensor]:
    """All layers of a pass that has begun; their outputs."""
    outs = []
    for layer, (query, key, value, experts) in enumerate(inputs):
        outs.append(twin.cache.attend(twin.batch, layer, query, key, value, 0.3))
        twin.cache.routed(twin.batch, layer, experts if layer else None)
    return outs


def replayed(eager: Twin, taped: Twin, rows: int, passes: int = PASSES) -> int:
    """Compares passes of one cache with the replayed ops of another one's; ops per layer."""
    one = [1] * rows
    inputs = taped.inputs(one)
    expected = eager.make(one)
    tape = Tape()
    taped.cache.begin_step(taped.batch, one)
    with tape:
        outs = layers(taped, inputs)
    taped.passes += 1
    assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))
    for _ in range(passes):
        for kept, new in zip(inputs, taped.inputs(one), strict=True):
            for mine, x in zip(kept, new, strict=True):
                if x is not None:
                    mine.copy_(x)
        expected = eager.make(one)
        taped.cache.begin_step(taped.batch, one)
        tape.replay()
        taped.cache.end_step(taped.batch)
        taped.passes += 1
        assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))
    assert same(eager.state(), taped.state())
    return len(tape.ops) // eager.shape.num_layers


CODECS = [
    "none",
    "fp8",
    "int8",
    "int4",
    {"name": "int4", "values": "int2", "scales": 8},
    {"name": "int3", "clip": True},
]


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_a_taped_decode_pass_goes_on_for_many(codec: Any) -> None:
    twins = [Twin(SHAPE, 7, rows=3, codec=codec, capacity_tokens=4000) for _ in range(2)]
    for twin in twins:
        twin.make([37, 16, 30])
    assert replayed(*twins, rows=3) == 5


def test_lists_longer_than_a_segment() -> None:
    """What was reserved stays where it is."""
    twins = [Twin(SHAPE, 7, rows=2, capacity_tokens=4000) for _ in range(2)]
    for twin in twins:
        twin.make([8 * 31, 8 * 62])
    assert replayed(*twins, rows=2, passes=40) == 5


@pytest.mark.parametrize("codec", ["none", "int8"])
def test_latent_pages(codec: str) -> None:
    twins = [Twin(LATENT, 7, rows=3, codec=codec, capacity_tokens=4000) for _ in range(2)]
    for twin in twins:
        twin.make([37, 16, 30])
    assert replayed(*twins, rows=3) == 5


def test_what_depends_on_the_host_is_found() -> None:
    """The tape itself can fail: a sparse lookup makes its tables on the host."""
    twins = [Twin(SHAPE, 7, lookup={"name": "quest", "budget": 0.5}) for _ in range(2)]
    for twin in twins:
        twin.make([37, 16])
    with pytest.raises(AssertionError, match="host"):
        replayed(*twins, rows=2)


class Count(TorchDispatchMode):
    """Counts the ops that torch dispatches, views and allocations left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and "empty" not in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("settings", "ops"),
    [
        ({}, 5),
        ({"retention": "streaming", "budget": {"name": "ada", "tokens": 24}}, 8),
        ({"codec": {"name": "int4", "rotate": True}}, 20),
        ({"retention": "h2o", "budget": {"name": "uniform", "tokens": 24}}, 30),
        ({"lookup": {"name": "quest", "budget": 0.5}}, 71),
        ({"lookup": {"name": "two_stage", "budget": 0.5}}, 90),
    ],
    ids=str,
)
def test_ops_per_layer_are_those_of_the_docs(settings: dict[str, Any], ops: int) -> None:
    """Of a layer with a router, in a decode pass that fills no page; docs/how-it-works.md has the table."""
    twin = Twin(SHAPE, 7, rows=3, **settings)
    twin.make([33, 17, 25])
    twin.make([1, 1, 1])
    inputs = twin.inputs([1, 1, 1])
    twin.cache.begin_step(twin.batch, [1, 1, 1])
    for layer, (query, key, value, experts) in enumerate(inputs):
        with Count() as counting:
            twin.cache.attend(twin.batch, layer, query, key, value, 0.3)
            twin.cache.routed(twin.batch, layer, experts if layer else None)
    assert counting.count == ops  # of the last layer
