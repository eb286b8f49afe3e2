"""Codecs: how the bytes of a sealed page are encoded.

The integer codecs follow KIVI (Liu et al. 2024): keys are quantized per channel within a page,
because key channels have outliers; values per token, because value outliers follow tokens. Both
are asymmetric, with scale and minimum beside the data; the open tail stays in full
precision. fp8 (e4m3, Micikevicius et al. 2022) is scaled along the same lines, without a minimum.
Latent pages have keys alone (see `pikv_ds.layout`).

Before that, keys and values may be rotated (`rotate`) or projected onto calibrated bases (`projections`, see
`pikv_ds.calibrate`); attention then works on the coefficients (`pikv_ds.ops.projections`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from pikv_ds.layout import BITS, PLAIN, PageLayout
from pikv_ds.ops.projections import Projections, hadamard

ELEMENTS = ("none", "fp8", "int8", "int4", "int3", "int2", "int1")
"""What an element can be stored as; none: the model's own type."""


@dataclass(frozen=True)
class Codec:
    """How keys and values are stored. Chosen by name, or ``{"name": "int4", "rotate": true, ...}``."""

    name: str
    """The element of the keys, one of `ELEMENTS`."""
    values: str | None = None
    """The element of the values; None: the same."""
    rotate: bool = False
    """Rotate keys and values by a Hadamard matrix first, which spreads outliers over the channels."""
    clip: bool = False
    """Narrow the range of each group of integers to where the squared error is least. For one to three bits."""
    scales: int = 16
    """Bits of a scale, and of a minimum, of integers: 16, or 8."""
    projections: str | None = None
    """Path of calibrated bases (``pikv calibrate``), instead of a rotation."""

    def __post_init__(self) -> None:
        if self.values is not None and self.values not in ELEMENTS:
            raise ValueError(f"values = {self.values!r}: choose one of {', '.join(ELEMENTS)}")
        for key in ("rotate", "clip"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key} = {getattr(self, key)!r}: use true or false")
        if self.scales not in (8, 16):
            raise ValueError(f"scales = {self.scales!r}: use 16, or 8 with integers")
        elements = [self.name, self.values or self.name]
        for key, unset in (("clip", False), ("scales", 16)):
            if getattr(self, key) != unset and not any(e.startswith("int") for e in elements):
                raise ValueError(f"{key} = {getattr(self, key)!r}: is of integers, the codec is {self.name!r}")
        if self.scales == 8 and "fp8" in elements:
            raise ValueError("scales = 8: fp8 has float16 scales; leave it out")
        if self.rotate and self.projections is not None:
            raise ValueError(f"rotate = True: projections = {self.projections!r} take its place; leave one out")

    def layout(
        self,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        dtype: torch.dtype,
        latent_dim: int | None = None,
        value_rank: int | None = None,
    ) -> PageLayout:
        """The layout of one page in bytes.

        Args:
            head_dim: channels of a stored key.
            latent_dim, value_rank: see `PageLayout`.

        Raises:
            ValueError: the head size cannot be packed (int4 puts two channels into a byte, int2 four, int3 and int1
                eight), the model's type cannot be stored, or there are more latent than key channels.
        """
        if dtype not in PLAIN:
            raise ValueError(f"keys and values of type {dtype}: pages take float32, bfloat16 or float16")
        if latent_dim is not None and (self.rotate or self.projections is not None or self.values is not None):
            raise ValueError(
                f'pikv.codec = "{self.name}": latent pages (multi-head latent attention) take neither rotate, '
                "projections nor values of their own; leave these options out"
            )
        stored = {"none": PLAIN[dtype]}
        for name, channels in ((self.name, head_dim), (self.values or self.name, value_rank or head_dim)):
            per_byte = {"int4": 2, "int2": 4, "int3": 8, "int1": 8}.get(name, 1)
            if channels % per_byte:
                raise ValueError(
                    f'pikv.codec = "{name}": packs {per_byte} channels into a byte, but head_dim is {channels}; '
                    'use "int8"'
                )
        element = stored.get(self.name, self.name)
        values = None if self.values is None else stored.get(self.values, self.values)
        assert element in BITS
        return PageLayout(
            num_kv_heads, head_dim, page_size, dtype, element, latent_dim, values, self.scales, self.clip, value_rank
        )

    def bases(self, num_layers: int, num_kv_heads: int, head_dim: int, device: torch.device) -> list[Projections]:
        """The bases of every layer, none where keys and values are stored as they are.

        Raises:
            ValueError: a file that is missing or of another model, with what was expected and found.
        """
        if self.projections is not None:
            return load_projections(self.projections, num_layers, num_kv_heads, head_dim, device)
        if not self.rotate:
            return []
        matrix = hadamard(head_dim).to(device).expand(num_kv_heads, -1, -1)
        return [Projections.of_bases(matrix, matrix)] * num_layers

    def settings(self) -> str | dict[str, object]:
        """As it stands in a configuration."""
        unlike = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name != "name" and getattr(self, f.name) != f.default
        }
        return {"name": self.name, **unlike} if unlike else self.name


def load_projections(
    path: str, num_layers: int, num_kv_heads: int, head_dim: int, device: torch.device
) -> list[Projections]:
    """Bases that `pikv_ds.calibrate` has written."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"pikv.codec.projections = {path!r}: {error}; write the file with `pikv calibrate`") from None
    out = []
    for layer in range(num_layers):
        names = [f"{layer}.{f.name}" for f in dataclasses.fields(Projections)]
        found = [list(tensors[name].shape) if name in tensors else None for name in names]
        if any(shape is None or shape[:2] != [num_kv_heads, head_dim] for shape in found):
            raise ValueError(
                f"pikv.codec.projections = {path!r}: layer {layer} has {found}, this model wants "
                f"[{num_kv_heads}, {head_dim}, rank]; calibrate it for this model"
            )
        out.append(Projections(*(tensors[name].float() for name in names)))
    return out


CODECS: dict[str, Codec] = {name: Codec(name) for name in ELEMENTS}
