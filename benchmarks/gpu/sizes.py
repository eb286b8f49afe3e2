"""How large everything is: on a GPU, and in a dry run."""

from __future__ import annotations

from dataclasses import dataclass

CODECS = ("none", "fp8", "int8", "int4", "int2")


@dataclass(frozen=True)
class Sizes:
    """Of all steps."""

    copy_bytes: tuple[int, ...]
    every: int
    """Every so many of the cases that are compared with float64."""
    codecs: tuple[str, ...]
    contexts: tuple[int, ...]
    """Tokens per sequence."""
    batches: tuple[int, ...]
    page_sizes: tuple[int, ...]
    heads: tuple[int, int, int]
    """Query heads, KV heads and head size of the timings."""
    working_set: int
    """Bytes that a timed contender walks through at least, more than the GPU's second-level cache holds."""
    rounds: int
    layer: tuple[int, int, int, int]
    """Layers, sequences, tokens and passes of the decode pass."""
    probe: int
    """Tokens of the call that tools look at."""
    processes: int
    """That run tests."""
    tests: tuple[str, ...]
    """Arguments of pytest that choose them."""
    chunk: int
    """Tests per process."""

    def ragged(self, page_size: int) -> tuple[int, ...]:
        """Pages of each sequence: a long one beside short ones of different lengths."""
        long, others = self.contexts[-1] // page_size, self.batches[-1] - 1
        return long, *(1 + long * (7 * i % 32 + 1) // 512 for i in range(others))


FULL = Sizes(
    copy_bytes=(1 << 28, 1 << 30, 1 << 32),
    every=1,
    codecs=CODECS,
    contexts=(32 << 10, 128 << 10),
    batches=(1, 8, 32),
    page_sizes=(32, 64),
    heads=(32, 8, 128),
    working_set=1 << 29,
    rounds=20,
    layer=(8, 8, 16 << 10, 6),
    probe=32 << 10,
    processes=12,
    tests=(
        "tests/test_ops.py",
        "tests/test_seal.py",
        "tests/test_scheduling.py",
        "tests/test_packed_pages.py",
        "-kcuda",
    ),
    chunk=40,
)

TINY = Sizes(
    copy_bytes=(1 << 20,),
    every=13,
    codecs=("none", "int4"),
    contexts=(256,),
    batches=(1, 2),
    page_sizes=(32,),
    heads=(4, 2, 64),
    working_set=1 << 16,
    rounds=2,
    layer=(2, 2, 48, 2),
    probe=64,
    processes=2,
    tests=("tests/test_ops.py", "-kties_go_to_the_earlier_page"),
    chunk=1,
)
