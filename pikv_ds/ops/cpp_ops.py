"""The compiled ops: arguments of `Ops` to those of ``torch.ops.pikv_ds`` (csrc/bindings.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

_C = torch.ops.pikv_ds


def supported(device_type: str) -> frozenset[str]:
    """Ops that have kernels for a device."""
    return frozenset({"merge_partials"}) if device_type == "cpu" else frozenset()


def merge_partials(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor) -> None:
    _C.merge_partials(outs, lses, out, lse)
