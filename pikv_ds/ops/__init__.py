"""The kernels: one signature per op, several backends, the choice made once.

Shape letters: R query rows, H query heads, K KV heads, D head size, S page size, P pages,
N any number, B sequences, T tokens. Log-sum-exps are natural logarithms in float32; an empty
partial is ``out = 0, lse = -inf``. All ops write into tensors that the caller owns.

=====================  ======================================================  =================
op                     what                                                    backends
=====================  ======================================================  =================
`seal_pages`           encode the keys and values of full pages                reference
`unseal_pages`         decode them                                             reference
`page_bounds`          per-channel minima and maxima of a page's keys          reference
`gather_pages`         copy pages out of their slots                           reference
`decode_attention`     partial attention of few queries over paged keys        reference
`context_attention`    partial attention of many queries over plain keys       reference
`tail_attention`       partial attention over the open tails                   reference
`merge_partials`       exact merge of partial attentions                       reference, cpp
`page_scores`          Quest's upper bounds on stored summaries                reference
`select_pages`         top pages under a budget, pinned ones always            reference
=====================  ======================================================  =================
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pikv_ds.layout import PageLayout
from pikv_ds.ops import reference


def cpp_missing() -> str | None:
    """Why the compiled ops cannot be used, None if they can."""
    try:
        importlib.import_module("pikv_ds._C")
    except ImportError as error:
        return f"the extension pikv_ds._C is not built ({error}); run: pip install --no-build-isolation -e ."
    return None


def _merge_partials_cpp(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor) -> None:
    torch.ops.pikv_ds.merge_partials(outs, lses, out, lse)


_CPP: dict[str, Callable[..., Any]] = {"merge_partials": _merge_partials_cpp}
_CPP_DEVICES = ("cpu",)


@dataclass(frozen=True)
class Ops:
    """The ops of one backend on one device.

    "auto" takes the compiled op where there is one for the device and the reference elsewhere;
    "reference" and "cpp" force one (under "cpp", an op without a compiled version still runs as
    the reference).
    """

    backend: str = "auto"
    device_type: str = "cpu"

    def __post_init__(self) -> None:
        if self.backend == "cpp":
            missing = cpp_missing()
            if missing is None and self.device_type not in _CPP_DEVICES:
                missing = f"no compiled ops for device {self.device_type!r}"
            if missing:
                raise ValueError(f'pikv.backend = "cpp": {missing}; or use "auto"')
        compiled = self.backend == "cpp" or (
            self.backend == "auto" and self.device_type in _CPP_DEVICES and cpp_missing() is None
        )
        object.__setattr__(self, "_compiled", compiled)

    def implementation(self, op: str) -> str:
        """Which backend runs an op: "reference" or "cpp"."""
        return "cpp" if self._compiled and op in _CPP else "reference"  # type: ignore[attr-defined]

    def _get(self, op: str) -> Callable[..., Any]:
        return _CPP[op] if self.implementation(op) == "cpp" else getattr(reference, op)

    def seal_pages(self, keys: Tensor, values: Tensor, layout: PageLayout, out: Tensor) -> None:
        """Encodes full pages.

        Args:
            keys, values: ``[N, K, S, D]`` in the model's dtype.
            out: uint8 ``[N, page_bytes]``; padding bytes are written as 0.
        """
        self._get("seal_pages")(keys, values, layout, out)

    def unseal_pages(self, pages: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor]:
        """Decodes pages uint8 ``[N, page_bytes]`` into float32 keys and values ``[N, K, S, D]``."""
        return self._get("unseal_pages")(pages, layout)

    def page_bounds(self, keys: Tensor, out: Tensor) -> None:
        """Writes each page's key minima and maxima per KV head and channel (Quest).

        Args:
            keys: ``[N, K, S, D]``.
            out: uint8 ``[N, summary_bytes]``, receives ``[2, K, D]`` in the keys' dtype.
        """
        self._get("page_bounds")(keys, out)

    def gather_pages(self, slabs: Sequence[Tensor | None], slots: Tensor) -> Tensor:
        """Copies pages out of their slots: uint8 ``[*slots.shape, page_bytes]``.

        Args:
            slabs: the pool's slabs, each uint8 ``[slab_pages, page_bytes]``.
            slots: integer, any shape, all valid.
        """
        return self._get("gather_pages")(slabs, slots)

    def decode_attention(
        self,
        query: Tensor,
        slabs: Sequence[Tensor | None],
        table: Tensor,
        counts: Tensor,
        layout: PageLayout,
        scale: float,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """Partial attention of single queries over paged keys (flash-decoding, Dao et al. 2023).

        Args:
            query: ``[R, H, D]``.
            slabs: the pool's slabs.
            table: int32 slots ``[R, P]``, or ``[R, K, P]`` with a selection per KV head. Slot 0
                is a hole. Entries at and beyond ``counts`` are never read.
            counts: int64 ``[R]``.
            scale: factor on ``q . k``.
            out, lse: float32 ``[R, H, D]``, ``[R, H]``.
        """
        self._get("decode_attention")(query, slabs, table, counts, layout, scale, out, lse)

    def context_attention(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        first_query: int | None,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """Partial attention of many queries of one sequence over contiguous keys.

        Args:
            query: ``[T, H, D]``.
            keys, values: ``[K, N, D]``.
            first_query: index of the key that belongs to query 0 (causal: query ``t`` sees keys up
                to ``first_query + t``); None: every query sees every key.
            out, lse: float32 ``[T, H, D]``, ``[T, H]``.
        """
        self._get("context_attention")(query, keys, values, scale, first_query, out, lse)

    def tail_attention(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        lengths: Tensor,
        scale: float,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """Partial attention of one query per sequence over its open tail.

        Args:
            query: ``[B, H, D]``.
            keys, values: ``[B, K, S, D]``; tokens at and beyond ``lengths`` are never used.
            lengths: int64 ``[B]``, 0 gives an empty partial.
            out, lse: float32 ``[B, H, D]``, ``[B, H]``.
        """
        self._get("tail_attention")(query, keys, values, lengths, scale, out, lse)

    def merge_partials(self, outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor) -> None:
        """Merges partial attentions over disjoint keys, in the order given (invariant: same bits).

        Args:
            outs, lses: float32 ``[P, N, D]``, ``[P, N]``; a partial with lse -inf is not read.
            out, lse: float32 ``[N, D]``, ``[N]``.
        """
        self._get("merge_partials")(outs, lses, out, lse)

    def page_scores(
        self,
        query: Tensor,
        summary_slabs: Sequence[Tensor | None],
        table: Tensor,
        counts: Tensor,
        layout: PageLayout,
        out: Tensor,
    ) -> None:
        """Upper bound of ``q . k`` for each page, the maximum over a KV head's query heads (Quest).

        Args:
            query: ``[R, H, D]``.
            summary_slabs: the pool's summary slabs (see `page_bounds`).
            table, counts: ``[R, P]`` slots and ``[R]``.
            out: float32 ``[R, K, P]``; -inf at and beyond ``counts``.
        """
        self._get("page_scores")(query, summary_slabs, table, counts, layout, out)

    def select_pages(
        self,
        table: Tensor,
        counts: Tensor,
        scores: Tensor,
        pinned: Tensor,
        budget: Tensor,
        out: Tensor,
    ) -> None:
        """Keeps the best pages of each row and KV head; ties go to the page that came first.

        Args:
            table, counts: ``[R, P]`` slots and ``[R]``.
            scores: float32 ``[R, K, P]``.
            pinned: bool ``[R, P]``, pages that are always kept, within the budget where it suffices.
            budget: int64 ``[R]``, pages to keep.
            out: int32 ``[R, K, P]``: the slot where a page is kept, 0 elsewhere.
        """
        self._get("select_pages")(table, counts, scores, pinned, budget, out)
