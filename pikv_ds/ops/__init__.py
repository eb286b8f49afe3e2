"""The kernels: one signature per op, four backends, the choice made once.

=====================  ======================================================================
op                     what
=====================  ======================================================================
`seal_pages`           encode the keys and values of full pages, and take their key bounds
`gather_pages`         copy pages out of their slots
`scatter_pages`        copy pages into their slots
`place_pages`          give pages owners within the ranks' limits; on the host
`decode_attention`     partial attention of few queries over paged keys
`prefill_attention`    partial attention of many queries of one sequence over its pages
`context_attention`    partial attention of many queries over plain keys
`tail_attention`       partial attention over the open tails
`append_tokens`        put the newest tokens of sequences into their tails
`append_experts`       the same for the experts that they chose
`merge_partials`       exact merge of partial attentions
`page_scores`          Quest's upper bounds on stored key bounds
`subpage_scores`       estimates of each page's log-sum-exp from its sub-pages
`key_scores`           exact scores on stored keys, to rank a shortlist again
`select_pages`         top pages under a budget, pinned ones always
`update_utility`       one step of what retention knows of each page
`choose_victims`       the pages that are least worth keeping
=====================  ======================================================================

Signatures, shapes and meaning stand in `pikv_ds.ops.reference`, which is also the specification.
Backends: ``reference`` (plain torch), ``cpp`` (csrc/, on CPU and CUDA) and ``triton``.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from typing import Any

from pikv_ds.errors import UsageError
from pikv_ds.layout import PageLayout
from pikv_ds.ops import reference
from pikv_ds.ops.state import UtilityState

__all__ = ["BACKENDS", "OPS", "Ops", "UtilityState", "why_missing"]

BACKENDS = ("auto", "reference", "cpp", "triton")
READ_VALUES = (
    "seal_pages",
    "decode_attention",
    "prefill_attention",
    "context_attention",
    "tail_attention",
    "key_scores",
)
"""Ops whose kernels need code of their own for latent pages."""
READ_PAGES = ("seal_pages", "decode_attention", "prefill_attention", "key_scores")
"""Ops whose kernels need code of their own for each kind of page elements."""
ON_THE_HOST = ("place_pages",)
"""Ops whose tensors are on the host whatever the device; all backends but the reference take the compiled ones."""
SPECIAL_PAGES = ("cpp",)
"""Backends whose kernels know latent and packed pages, and narrow ranges (`PageLayout.clip`)."""


class Ops:
    """The ops of one backend on one device.

    Args:
        backend: "auto" takes the fastest that is there, op by op; "cpp" and "triton" take theirs
            (an op that a backend does not have runs as the reference); "reference" takes no other.
        device_type: "cpu" or "cuda".
        layout: of the pages: where a backend cannot read them (latent ones, or elements and scales that kernels do
            not know), `READ_VALUES` run as the reference.

    Raises:
        ValueError: the backend cannot run here, or not on such pages, with the reason and the remedy.
    """

    seal_pages = staticmethod(reference.seal_pages)
    gather_pages = staticmethod(reference.gather_pages)
    scatter_pages = staticmethod(reference.scatter_pages)
    place_pages = staticmethod(reference.place_pages)
    decode_attention = staticmethod(reference.decode_attention)
    prefill_attention = staticmethod(reference.prefill_attention)
    context_attention = staticmethod(reference.context_attention)
    tail_attention = staticmethod(reference.tail_attention)
    append_tokens = staticmethod(reference.append_tokens)
    append_experts = staticmethod(reference.append_experts)
    merge_partials = staticmethod(reference.merge_partials)
    page_scores = staticmethod(reference.page_scores)
    subpage_scores = staticmethod(reference.subpage_scores)
    key_scores = staticmethod(reference.key_scores)
    select_pages = staticmethod(reference.select_pages)
    update_utility = staticmethod(reference.update_utility)
    choose_victims = staticmethod(reference.choose_victims)

    def __init__(self, backend: str = "auto", device_type: str = "cpu", layout: PageLayout | None = None) -> None:
        self.backend, self.device_type, self.layout = backend, device_type, layout
        if backend not in ("auto", "reference") and self._unable(backend):
            raise UsageError(
                f'pikv.backend = "{backend}": it has no kernels for {self._kind} on device {device_type!r}; '
                'use "auto" or "reference"'
            )
        self._owners: dict[str, str] = {}
        fastest_first = ("cpp", "triton") if device_type == "cuda" else ("cpp",)  # nobody wants Triton interpreted
        for name in {"auto": fastest_first, "reference": ()}.get(backend, (backend,)):
            missing = why_missing(name, device_type)
            if missing is None:
                self._take(name, importlib.import_module(f"pikv_ds.ops.{name}_ops"))
            elif backend != "auto":
                raise UsageError(f'pikv.backend = "{backend}": {missing}; or use "auto"')
        missing = why_missing("cpp", device_type) if device_type == "cuda" and backend == "auto" else None
        if missing is not None and self._owners:
            _warn_once(f"the ops run on Triton, slower than with CUDA kernels: {missing}")
        if backend == "auto" and not self._owners:
            _warn_once(f"the ops run as plain torch, which is slow: {why_missing('cpp', device_type)}")
        elif backend == "auto" and self._owners:
            slow = sorted({op for name in fastest_first for op in self._unable(name)} - set(self._owners))
            if slow:
                _warn_once(
                    f"{self._kind} have no kernels on device {device_type!r} yet: {', '.join(slow)} run as plain "
                    "torch, which is slow"
                )
        if backend != "reference" and why_missing("cpp", "cpu") is None:
            compiled = importlib.import_module("pikv_ds.ops.cpp_ops")
            for op in compiled.supported("cpu").intersection(ON_THE_HOST):
                self._owners[op] = "cpp"
                setattr(self, op, getattr(compiled, op))

    def _take(self, name: str, module: Any) -> None:
        """Takes the ops of a backend that none before it has."""
        for op in module.supported(self.device_type):
            if op not in self._owners and op not in self._unable(name):
                self._owners[op] = name
                setattr(self, op, getattr(module, op))

    @property
    def _kind(self) -> str:
        """What is special about the pages."""
        latent = self.layout is not None and self.layout.latent_dim is not None
        return "latent pages (multi-head latent attention)" if latent else "pages of this codec"

    def _unable(self, backend: str) -> tuple[str, ...]:
        """Ops whose kernels in a backend cannot read the pages, or not write them."""
        if self.layout is None:
            return ()
        special = backend in SPECIAL_PAGES
        if self.layout.latent_dim is not None and not special:
            return READ_VALUES
        if not self.layout.kernels_know:
            return () if self.layout.packed and special else READ_PAGES
        return ("seal_pages",) if self.layout.clip and not special else ()

    def implementation(self, op: str) -> str:
        """Which backend runs an op: "reference", "cpp" or "triton"."""
        return self._owners.get(op, "reference")


OPS = tuple(name for name, value in vars(Ops).items() if isinstance(value, staticmethod))


@cache
def why_missing(backend: str, device_type: str) -> str | None:
    """Why a backend ("cpp" or "triton") cannot run on a device, None if it can."""
    if backend == "cpp":
        try:
            importlib.import_module("pikv_ds._C")
        except ImportError as error:
            return f"the extension pikv_ds._C is not built ({error}); run: pip install --no-build-isolation -e ."
        if not importlib.import_module("pikv_ds.ops.cpp_ops").supported(device_type):
            if device_type == "cuda":
                cause = importlib.import_module("pikv_ds._C").why_no_cuda()
                return (
                    f"the extension pikv_ds._C was built without CUDA kernels ({cause}); install a torch for CUDA and "
                    "the CUDA toolkit of its version, set CUDA_HOME to the toolkit, and run: "
                    "pip install --no-build-isolation --force-reinstall --no-deps . in pikv-ds' folder"
                )
            return f"the extension pikv_ds._C has no ops for device {device_type!r}"
        return None
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error}); run: pip install triton"
    if device_type != "cuda" and not triton.knobs.runtime.interpret:
        return f"triton has no device {device_type!r} (TRITON_INTERPRET=1 interprets its kernels, very slowly)"
    return None


@cache
def _warn_once(message: str) -> None:
    logging.getLogger("pikv_ds").warning(message)
