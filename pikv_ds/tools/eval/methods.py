"""What is compared: PiKV with a configuration, kvpress' presses, transformers' quantized cache, and the full cache.

A method turns a snapshot into a cache that the model goes on with, and tells how much memory that cache has
allocated: storages, each counted once, whatever they are used for.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, QuantizedCache

import pikv_ds
from pikv_ds.api import attachment_of
from pikv_ds.errors import UsageError
from pikv_ds.tools.eval.snapshot import Snapshot


class Method(Protocol):
    """A way to keep a prompt's keys and values."""

    @property
    def name(self) -> str:
        """As it stands in tables."""
        ...

    @property
    def family(self) -> str:
        """ "pikv", "kvpress" or "transformers"."""
        ...

    def open(self, model: PreTrainedModel, snapshot: Snapshot) -> Any:
        """A context manager that gives `Prepared`."""
        ...


@dataclass
class Prepared:
    """A cache with a compressed prompt in it."""

    cache: Any
    positions: bool
    """Whether the model must be told the positions, since the cache has fewer tokens than there were."""
    stats: Any = None

    @property
    def ragged(self) -> bool:
        """Whether layers hold different numbers of tokens; transformers' masks of several queries have one length."""
        return self.positions and len({layer.keys.shape[2] for layer in self.cache.layers}) > 1

    def nbytes(self) -> int:
        """Memory allocated for keys, values and whatever tells where they are."""
        if self.stats is not None:
            return int(self.stats())
        return allocated(self.cache)


@dataclass(frozen=True)
class Full:
    """The uncompressed, unsharded cache."""

    name = "full cache"
    family = "transformers"

    @contextlib.contextmanager
    def open(self, model: PreTrainedModel, snapshot: Snapshot) -> Iterator[Prepared]:
        yield Prepared(snapshot.full_cache(), False)


@dataclass(frozen=True)
class PiKV:
    """PiKV with a configuration."""

    label: str
    config: dict[str, Any]
    family = "pikv"

    @property
    def name(self) -> str:
        return self.label

    @contextlib.contextmanager
    def open(self, model: PreTrainedModel, snapshot: Snapshot) -> Iterator[Prepared]:
        pikv_ds.attach(model, self.config)
        cache = pikv_ds.new_cache(model)
        try:
            feed(cache, snapshot)
            store = attachment_of(model).store
            yield Prepared(cache, False, lambda: store.kv_bytes + store.pool.summary_storage_bytes)
        finally:
            cache.release()
            pikv_ds.detach(model)


def feed(cache: Any, snapshot: Snapshot) -> None:
    """Puts a prompt into an empty `PiKVCache` as its prefill would."""
    store = cache.store
    batch = store.new_batch(1)
    cache.adopt(batch, snapshot.length)
    store.begin_step(batch, [snapshot.length])
    for index, layer in enumerate(snapshot.layers):
        query, key, value = (x[0].transpose(0, 1).contiguous() for x in (layer.query, layer.key, layer.value))
        source = (layer.module, layer.hidden, {"position_embeddings": layer.positions})
        store.attend(batch, index, query, key, value, layer.scale, attend_prompts=False, source=lambda _, s=source: s)
        store.routed(batch, index, layer.experts)


@dataclass(frozen=True)
class Press:
    """A press of kvpress, named by its class, e.g. "SnapKV", "PyramidKV" or "AdaKV+SnapKV"."""

    press: str
    ratio: float
    """Share of the tokens that is dropped."""
    family = "kvpress"

    @property
    def name(self) -> str:
        return f"{self.press} {self.ratio:.0%} off".replace("%", " %")

    def build(self) -> Any:
        """The press; `ValueError` where kvpress has none of the name."""
        try:
            import kvpress
        except ImportError as error:
            raise UsageError(
                f"--presses {self.press}: kvpress cannot be imported ({error}); pip install kvpress"
            ) from None

        def kind(name: str) -> Any:
            if not hasattr(kvpress, f"{name}Press"):
                known = sorted(n.removesuffix("Press") for n in dir(kvpress) if n.endswith("Press"))
                raise UsageError(f"--presses {name}: choose of {', '.join(known)}")
            return getattr(kvpress, f"{name}Press")

        outer, _, inner = self.press.partition("+")
        if inner:
            return kind(outer)(press=kind(inner)(compression_ratio=self.ratio))
        if outer == "ChunkKV":
            return kvpress.ChunkKVPress(press=kvpress.SnapKVPress(compression_ratio=self.ratio), chunk_length=20)
        return kind(outer)(compression_ratio=self.ratio)

    @contextlib.contextmanager
    def open(self, model: PreTrainedModel, snapshot: Snapshot) -> Iterator[Prepared]:
        press, cache = self.build(), DynamicCache()
        with contextlib.suppress(AttributeError):
            press.post_init_from_model(model)
        try:
            for i, layer in enumerate(snapshot.layers):
                layer.module.__dict__["rotary_emb"] = model.base_model.rotary_emb  # as the press itself puts it there
                kwargs = {"position_embeddings": layer.positions, "hidden_states": layer.hidden}
                key, value = press.compress(layer.module, layer.hidden, layer.key, layer.value, None, kwargs)
                cache.update(key.contiguous().clone(), value.contiguous().clone(), i)
            yield Prepared(cache, True)
        finally:
            for layer in snapshot.layers:  # what AdaKV leaves for its attention
                for name in ("masked_key_indices", "rotary_emb"):
                    layer.module.__dict__.pop(name, None)


@dataclass(frozen=True)
class Quantized:
    """transformers' QuantizedCache (quanto), the last 128 tokens in full precision."""

    bits: int
    family = "transformers"

    @property
    def name(self) -> str:
        return f"QuantizedCache int{self.bits}"

    @contextlib.contextmanager
    def open(self, model: PreTrainedModel, snapshot: Snapshot) -> Iterator[Prepared]:
        cache = QuantizedCache("quanto", model.config, nbits=self.bits, q_group_size=64, residual_length=128)
        for i, layer in enumerate(snapshot.layers):
            cache.update(layer.key, layer.value, i)
        yield Prepared(cache, False)


def allocated(cache: Any) -> int:
    """Bytes of the storages behind all tensors of a transformers cache."""
    storages: dict[int, int] = {}

    def walk(x: Any) -> None:
        if isinstance(x, Tensor) and type(x) not in (Tensor, torch.nn.Parameter) and hasattr(x, "__tensor_flatten__"):
            for name in x.__tensor_flatten__()[0]:
                walk(getattr(x, name))
        elif isinstance(x, Tensor):
            storage = x.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(x, (list, tuple)):
            for y in x:
                walk(y)

    for layer in cache.layers:
        for value in vars(layer).values():
            walk(value)
    return sum(storages.values())


PRESSES = (
    "Knorm", "SnapKV", "ExpectedAttention", "TOVA", "StreamingLLM", "PyramidKV", "AdaKV+SnapKV", "ChunkKV", "KeyDiff",
)  # fmt: skip
ROTATED = {"rotate": True, "clip": True, "scales": 8}
PIKV: dict[str, dict[str, Any]] = {
    "exact, none": {},
    "int8": {"codec": "int8"},
    "fp8": {"codec": "fp8"},
    "int4": {"codec": "int4"},
    "int2": {"codec": "int2"},
    "int2 rotated": {"codec": {"name": "int2", "rotate": True, "clip": True}},
    "int4/int4 r8": {"codec": {"name": "int4", **ROTATED, "clip": False}},
    "int4/int2 r8": {"codec": {"name": "int4", "values": "int2", **ROTATED}},
    "int3/int3 r8": {"codec": {"name": "int3", **ROTATED}},
    "int3/int2 r8": {"codec": {"name": "int3", "values": "int2", **ROTATED}},
    "int2/int2 r8": {"codec": {"name": "int2", **ROTATED}},
    "int2/int1 r8": {"codec": {"name": "int2", "values": "int1", **ROTATED}},
    "int2/int1 r8, chunk 93 %": {
        "codec": {"name": "int2", "values": "int1", **ROTATED},
        "retention": "chunk",
        "budget": {"name": "uniform", "prompt": 0.93},
    },
    "int3/int1 r8, chunk 80 %": {
        "codec": {"name": "int3", "values": "int1", **ROTATED},
        "retention": "chunk",
        "budget": {"name": "uniform", "prompt": 0.8},
    },
    "snap, half": {"retention": "snap", "budget": {"name": "uniform", "prompt": 0.5}},
    "snap, half by ada": {"retention": "snap", "budget": {"name": "ada", "prompt": 0.5}},
    "quest 12.5 %": {"lookup": {"name": "quest", "budget": 0.125, "audit_every": 0}},
    "two_stage 12.5 %": {"lookup": {"name": "two_stage", "budget": 0.125, "audit_every": 0}},
    "cache_aware 12.5 %": {"lookup": {"name": "cache_aware", "budget": 0.125, "audit_every": 0}},
    "two_stage 12.5 %, int4": {"codec": "int4", "lookup": {"name": "two_stage", "budget": 0.125, "audit_every": 0}},
}
"""By their names in the tables: keys/values; r8: rotated, clipped, scales of eight bits."""


def standard() -> list[Method]:
    """PiKV's codecs and lookups, nine presses at three ratios, and QuantizedCache."""
    return [
        *(PiKV(name, config) for name, config in PIKV.items()),
        *(Press(name, ratio) for name in PRESSES for ratio in (0.5, 0.75, 0.875)),
        Quantized(4),
        Quantized(2),
    ]


def parse_press(text: str) -> Press:
    """``SnapKV:0.5``."""
    match = re.fullmatch(r"([A-Za-z+]+):(0?\.\d+)", text)
    if match is None:
        raise UsageError(f"--presses {text}: write NAME:RATIO, e.g. SnapKV:0.5")
    press = Press(match[1], float(match[2]))
    press.build()
    return press
