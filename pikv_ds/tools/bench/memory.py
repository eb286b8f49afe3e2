"""Ops that only move bytes, against a plain copy of as many bytes."""

from __future__ import annotations

import torch

from pikv_ds.tools.bench.attention import Setting, label
from pikv_ds.tools.bench.timing import Contender

PAGES = 256
"""Pages per call: a prompt of 8,192 tokens."""


def copying(setting: Setting, context: int | None = None) -> Contender:
    """A plain copy of the keys and values of a context (by default of what sealing gets), read and written."""
    tokens = PAGES * setting.page_size if context is None else context
    num_bytes = 2 * setting.num_kv_heads * tokens * setting.head_dim * setting.dtype.itemsize
    return copy_of(setting, num_bytes, label(context) if context else "")


def copy_of(setting: Setting, num_bytes: int, group: str = "") -> Contender:
    """A plain copy of so many bytes, which count twice: read and written."""
    copies = setting.copies(2 * num_bytes)
    source = torch.randint(256, (num_bytes,), dtype=torch.uint8, device=setting.device)
    sources, targets = ([source.clone() for _ in range(copies)] for _ in range(2))
    return Contender("copy", lambda i: targets[i].copy_(sources[i]), copies, 2 * num_bytes, group)


def sealing(setting: Setting, codec: str, backend: str = "auto") -> Contender:
    """`seal_pages` with key bounds, out of a prompt's keys and values ``[K, n, D]``."""
    layout, ops = setting.pages(codec, backend)
    tokens = PAGES * setting.page_size
    keys, values = setting.tokens(tokens), setting.tokens(tokens)
    out_bytes = PAGES * (layout.page_bytes + layout.bounds_bytes)
    num_bytes = 2 * keys.nbytes + out_bytes
    copies = setting.copies(num_bytes)
    inputs = [(keys.clone(), values.clone()) for _ in range(copies)]
    outs = [torch.zeros(PAGES, out_bytes // PAGES, dtype=torch.uint8, device=setting.device) for _ in range(copies)]
    flag = torch.zeros(1, dtype=torch.int32, device=setting.device)

    def run(i: int) -> None:
        k, v = (x.unflatten(1, (PAGES, setting.page_size)).transpose(0, 1) for x in inputs[i])
        out = outs[i]
        ops.seal_pages(k, v, layout, out[:, : layout.page_bytes], out[:, layout.page_bytes :], flag)

    name = f"seal {codec}" + ("" if backend == "auto" else f" ({backend})")
    return Contender(name, run, copies, num_bytes)
