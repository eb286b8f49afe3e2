"""Codecs: how the bytes of a sealed page are encoded.

The integer codecs follow KIVI (Liu et al. 2024): keys are quantized per channel within a page,
because key channels have outliers; values per token, because value outliers follow tokens. Both
are asymmetric, with scale and minimum beside the data; the open tail stays in full
precision. fp8 (e4m3, Micikevicius et al. 2022) is scaled along the same lines, without a minimum.
Latent pages have keys alone (see `pikv_ds.layout`).

Layers, KV heads or experts may have codecs of their own (`PerLayerCodec`, `PerHeadCodec`, `PerExpertCodec`): a codec
policy names them and says which one a page gets; a plain `Codec` is its own only choice.

Before that, keys and values may be rotated (`rotate`) or projected onto calibrated bases (`projections`, see
`pikv calibrate`); attention then works on the coefficients (`pikv_ds.ops.projections`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch

from pikv_ds import checks
from pikv_ds.errors import UsageError
from pikv_ds.layout import BITS, PLAIN, PageLayout
from pikv_ds.ops.projections import Projections, hadamard
from pikv_ds.policies.heads import HEADS_REMEDY, check_heads, read_heads

ELEMENTS = ("none", "fp8", "int8", "int4", "int3", "int2", "int1")
"""What an element can be stored as; none: the model's own type."""
MOST_NUMBER = 2**16 - 1
"""Of a layer or an expert: no model has so many."""


@runtime_checkable
class CodecPolicy(Protocol):
    """Which codec a page gets."""

    @property
    def codecs(self) -> tuple[Codec, ...]:
        """All that there are, no two the same."""
        ...

    @property
    def per_head(self) -> bool:
        """Heads of a layer may differ, so each has pages of its own."""
        ...

    @property
    def per_expert(self) -> bool:
        """`choose` looks at the home expert."""
        ...

    def choose(self, layer: int, head: int, expert: int | None) -> int:
        """A page's codec, as an index into `codecs`.

        Args:
            head: the first KV head that the page holds.
            expert: its home expert, None at layers without a router.
        """
        ...

    def check(self, num_layers: int, num_kv_heads: int, num_experts: int) -> None:
        """Raises ValueError where it is made for another model."""
        ...

    def settings(self) -> Any:
        """As it stands in a configuration."""
        ...

    def files(self) -> list[str]:
        """Paths of the calibration files that it reads."""
        ...


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
        checks.choice(self, "name", ELEMENTS, f"choose one of {', '.join(ELEMENTS)}")
        checks.choice(self, "values", (None, *ELEMENTS), f"choose one of {', '.join(ELEMENTS)}")
        checks.flag(self, "rotate", "clip")
        checks.choice(self, "scales", (8, 16), "use 16, or 8 with integers")
        checks.path(self, "projections", "name the file that `pikv calibrate` has written", optional=True)
        elements = [self.name, self.values or self.name]
        for key, unset in (("clip", False), ("scales", 16)):
            if getattr(self, key) != unset and not any(e.startswith("int") for e in elements):
                raise UsageError(
                    f"{key} = {getattr(self, key)!r}: only integer codecs have it, not {self.name!r}; leave it out"
                )
        if self.scales == 8 and "fp8" in elements:
            raise UsageError("scales = 8: fp8 has float16 scales; leave it out")
        if self.rotate and self.projections is not None:
            raise UsageError(
                f"rotate = True: projections = {checks.shown(self.projections)} take its place; leave one out"
            )

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
            raise UsageError(f"keys and values of type {dtype}: pages take float32, bfloat16 or float16")
        if latent_dim is not None and (self.rotate or self.projections is not None or self.values is not None):
            raise UsageError(
                f'pikv.codec = "{self.name}": latent pages (multi-head latent attention) take neither rotate, '
                "projections nor values of their own; leave these options out"
            )
        stored = {"none": PLAIN[dtype]}
        for name, channels in ((self.name, head_dim), (self.values or self.name, value_rank or head_dim)):
            per_byte = {"int4": 2, "int2": 4, "int3": 8, "int1": 8}.get(name, 1)
            if channels % per_byte:
                raise UsageError(
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

    def reach(self, dtype: torch.dtype) -> str:
        """Which keys and values it can hold, in words: for each of its elements, by what its scales are stored as.

        Args:
            dtype: the model's.
        """
        words = []
        for element in dict.fromkeys((self.name, self.values or self.name)):
            if element == "none":
                words.append(f"{PLAIN[dtype]} to {torch.finfo(dtype).max:,.4g}")
            elif element == "fp8":
                words.append(f"fp8 to {448 * 65504:,}")
            elif self.scales == 16:
                levels = 2 ** BITS[element] - 1
                words.append(f"{element} from -65,504 on, the largest less the smallest to {levels * 65504:,}")
            else:
                levels, step = 2 ** BITS[element] - 1, 2 ** (255.5 / 8 - 24)
                words.append(f"{element} to {24 * step:,.0f}, the largest less the smallest to {levels * step:,.0f}")
        return "; ".join(words)

    @property
    def codecs(self) -> tuple[Codec, ...]:
        return (self,)

    per_head = False
    per_expert = False

    def choose(self, layer: int, head: int, expert: int | None) -> int:
        return 0

    def check(self, num_layers: int, num_kv_heads: int, num_experts: int) -> None:
        pass

    def files(self) -> list[str]:
        return [] if self.projections is None else [self.projections]

    @property
    def label(self) -> str:
        """A short name for tables: ``int4/int2, rotated, clipped, 8-bit scales``."""
        parts = [self.name if self.values is None else f"{self.name}/{self.values}"]
        parts += [word for word, on in (("rotated", self.rotate), ("clipped", self.clip)) if on]
        parts += ["8-bit scales"] * (self.scales == 8) + ["projected"] * (self.projections is not None)
        return ", ".join(parts)

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
    """Bases that `pikv calibrate` has written."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise UsageError(f"pikv.codec.projections = {path!r}: {error}; write the file with `pikv calibrate`") from None
    out = []
    for layer in range(num_layers):
        names = [f"{layer}.{f.name}" for f in dataclasses.fields(Projections)]
        found = [list(tensors[name].shape) if name in tensors else None for name in names]
        if any(shape is None or shape[:2] != [num_kv_heads, head_dim] for shape in found):
            raise UsageError(
                f"pikv.codec.projections = {path!r}: layer {layer} has {found}, this model wants "
                f"[{num_kv_heads}, {head_dim}, rank]; calibrate it for this model"
            )
        out.append(Projections(*(tensors[name].float() for name in names)))
    return out


def parse_codec(setting: Any, key: str) -> Codec:
    """A codec as it stands in a configuration: a name, or an object with options.

    Raises:
        ValueError: beginning with the key.
    """
    if isinstance(setting, Codec):
        return setting
    options = {"name": setting} if isinstance(setting, str) else setting
    known = [f.name for f in dataclasses.fields(Codec)]
    if not isinstance(options, Mapping) or options.get("name") not in ELEMENTS:
        raise UsageError(f"{key} = {checks.shown(setting)}: name a codec, one of {', '.join(ELEMENTS)}")
    for option, value in options.items():
        if option not in known:
            raise UsageError(f"{key}.{checks.named(option)} = {checks.shown(value)}: choose one of {', '.join(known)}")
    try:
        return Codec(**options)
    except UsageError as error:
        raise UsageError(f"{key}.{error}") from None


def _parse_ranges(table: Any, key: str) -> dict[int, Codec]:
    """``{"0-2": "int8", "7": "int4"}`` by number."""
    if not isinstance(table, Mapping) or not table:
        raise UsageError(f'{key} = {checks.shown(table)}: write e.g. {{"0-2": "int8", "7": "int4"}}')
    out: dict[int, Codec] = {}
    for numbers, setting in table.items():
        first, last = _range(numbers, key)
        codec = parse_codec(setting, f"{key}.{numbers}")
        for number in range(first, last + 1):
            if number in out:
                raise UsageError(f"{key}: {number} is named twice")
            out[number] = codec
    return out


def _range(numbers: Any, key: str) -> tuple[int, int]:
    """The first and the last number of ``"0-2"`` or ``"7"``."""
    text = str(numbers) if type(numbers) is int and 0 <= numbers <= MOST_NUMBER else numbers
    match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", text) if isinstance(text, str) else None
    if match is None:
        raise UsageError(f'{key}: {checks.shown(numbers)} is no number and no range; write e.g. "3" or "0-2"')
    ends = [end.lstrip("0") or "0" for end in (match[1], match[2] or match[1])]
    if any(len(end) > 9 or int(end) > MOST_NUMBER for end in ends):
        raise UsageError(f"{key}: {checks.shown(numbers)}: use numbers of at most {MOST_NUMBER}")
    first, last = map(int, ends)
    if last < first:
        raise UsageError(f"{key}: {checks.shown(numbers)} has no numbers; write the smaller one first")
    return first, last


def _distinct(codecs: list[Codec]) -> tuple[Codec, ...]:
    return tuple(dict.fromkeys(codecs))


@dataclass(frozen=True)
class RangesCodec:
    """What codecs by layer and by expert have in common: a table of ranges, and a default."""

    default: Any = "none"
    """Of all that the table does not name."""
    per_head = False
    per_expert = False

    def __post_init__(self) -> None:
        _ = self.codecs
        key, ranges = self._ranges
        _make_plain(self, **{key: ranges}, default=self.default)

    @property
    def _ranges(self) -> tuple[str, Mapping[str, Any]]:
        """The table with the name of its key."""
        raise NotImplementedError

    @cached_property
    def _table(self) -> dict[int, Codec]:
        key, ranges = self._ranges
        return _parse_ranges(ranges, key)

    @cached_property
    def _default(self) -> Codec:
        return parse_codec(self.default, "default")

    @cached_property
    def codecs(self) -> tuple[Codec, ...]:
        return _distinct([self._default, *self._table.values()])

    def _choose(self, number: int | None) -> int:
        return self.codecs.index(self._default if number is None else self._table.get(number, self._default))

    def _check(self, what: str, count: int) -> None:
        if max(self._table) >= count:
            key, _ = self._ranges
            raise UsageError(f"pikv.codec.{key}: names {what} {max(self._table)}, the model has 0 to {count - 1}")

    def settings(self) -> Any:
        key, ranges = self._ranges
        return {"name": self.name, key: ranges, "default": self.default}  # type: ignore[attr-defined]

    def files(self) -> list[str]:
        return [path for codec in self.codecs for path in codec.files()]


@dataclass(frozen=True)
class PerLayerCodec(RangesCodec):
    """A codec for each layer, e.g. more bits for the first ones, whose errors reach all others."""

    layers: Mapping[str, Any] = field(default_factory=dict)
    """``{"0-2": "int8", "29": {"name": "int4", "rotate": true}}``"""
    name = "per_layer"

    @property
    def _ranges(self) -> tuple[str, Mapping[str, Any]]:
        return "layers", self.layers

    def choose(self, layer: int, head: int, expert: int | None) -> int:
        return self._choose(layer)

    def check(self, num_layers: int, num_kv_heads: int, num_experts: int) -> None:
        self._check("layer", num_layers)


@dataclass(frozen=True)
class PerExpertCodec(RangesCodec):
    """A codec for each home expert, e.g. more bits where the pages of rare or important experts lie.

    Pages of layers without a router get the default.
    """

    experts: Mapping[str, Any] = field(default_factory=dict)
    """``{"0-3": "int8"}``"""
    name = "per_expert"
    per_expert = True

    @property
    def _ranges(self) -> tuple[str, Mapping[str, Any]]:
        return "experts", self.experts

    def choose(self, layer: int, head: int, expert: int | None) -> int:
        return self._choose(expert)

    def check(self, num_layers: int, num_kv_heads: int, num_experts: int) -> None:
        self._check("expert", num_experts)


@dataclass(frozen=True)
class PerHeadCodec:
    """One codec for retrieval heads, one for the others (DuoAttention's classes, Xiao et al. 2024).

    Which heads are which is found out by ``pikv heads``. Unlike the budget `duo` it drops nothing.
    """

    heads: str = ""
    """Path of the file that ``pikv heads`` has written."""
    retrieval: Any = "int8"
    """Codec of retrieval heads."""
    default: Any = "int4"
    """Of the others."""
    name = "per_head"
    per_head = True
    per_expert = False

    def __post_init__(self) -> None:
        checks.path(self, "heads", HEADS_REMEDY)
        _ = self._table, self.codecs
        _make_plain(self, retrieval=self.retrieval, default=self.default)

    @cached_property
    def _table(self) -> list[list[bool]]:
        return read_heads(self.heads)

    @cached_property
    def codecs(self) -> tuple[Codec, ...]:
        return _distinct([parse_codec(self.default, "default"), parse_codec(self.retrieval, "retrieval")])

    def choose(self, layer: int, head: int, expert: int | None) -> int:
        return min(int(self._table[layer][head]), len(self.codecs) - 1)

    def check(self, num_layers: int, num_kv_heads: int, num_experts: int) -> None:
        check_heads(self._table, self.heads, num_layers, num_kv_heads, "pikv.codec.heads")

    def settings(self) -> Any:
        return {"name": self.name, "heads": self.heads, "retrieval": self.retrieval, "default": self.default}

    def files(self) -> list[str]:
        return [self.heads, *(path for codec in self.codecs for path in codec.files())]


def _plain(value: Any) -> Any:
    """Codecs as they stand in a configuration."""
    if isinstance(value, Codec):
        return value.settings()
    return {str(k): _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _make_plain(policy: Any, **values: Any) -> None:
    """Keeps settings that were checked as a configuration has them: equal ones compare equal, and nobody changes
    them afterwards."""
    for key, value in values.items():
        object.__setattr__(policy, key, _plain(value))


CODECS: dict[str, Any] = {
    **{name: Codec(name) for name in ELEMENTS},
    "per_layer": PerLayerCodec,
    "per_head": PerHeadCodec,
    "per_expert": PerExpertCodec,
}
"""A codec by its element, or a policy that chooses among several."""
