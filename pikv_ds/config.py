"""`PiKVConfig`: every setting of the cache, checked where it enters.

A configuration comes as keyword arguments or as a plain dict (`from_dict`: the ``"pikv"`` section
of a DeepSpeed JSON file). Every error names the key, the value and the remedy, so that a typo is
one line of output and not an hour of a cluster.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

from pikv_ds import checks
from pikv_ds.errors import UsageError
from pikv_ds.ops import BACKENDS
from pikv_ds.policies.budgets import BUDGETS, Budget, UniformBudget
from pikv_ds.policies.codecs import CODECS, Codec, CodecPolicy, parse_codec
from pikv_ds.policies.lookups import LOOKUPS, ExactLookup, Lookup
from pikv_ds.policies.placements import PLACEMENTS, ExpertPlacement, Placement
from pikv_ds.policies.retention import RETENTIONS, Retention

PAGE_SIZES = (1, 8, 16, 32, 64, 128, 256)
PARTIAL_DTYPES = ("float32", "bfloat16")
MOST_SLAB_PAGES = 2**16
"""A slab is allocated in one piece."""

POLICIES: dict[str, tuple[Any, Mapping[str, Any]]] = {
    "codec": (CodecPolicy, CODECS),
    "placement": (Placement, PLACEMENTS),
    "lookup": (Lookup, LOOKUPS),
    "budget": (Budget, BUDGETS),
    "retention": (Retention, RETENTIONS),
}
"""The settings that are policies: their kind, and what there is of it by name."""


class ConfigError(UsageError):
    """A setting that cannot work. The message names the key, the value and the remedy."""


@dataclass(frozen=True)
class PiKVConfig:
    """Settings of an expert-sharded KV cache. All ranks of a job must use the same ones."""

    page_size: int = 32
    """Consecutive tokens per page: the unit of placement, compression and transport.
    One of 8, 16, 32, 64, 128, 256; 1 is for experiments (each page costs about a hundred bytes on the host)."""

    codec: CodecPolicy = CODECS["none"]
    """How a sealed page's bytes are encoded: "none", "fp8", "int8", "int4", "int3", "int2", "int1", or with options,
    e.g. {"name": "int2", "rotate": true, "clip": true, "scales": 8}; or "per_layer", "per_head", "per_expert" with
    codecs of their own, e.g. {"name": "per_layer", "layers": {"0-2": "int8"}, "default": "int4"}."""

    demote: Codec | None = None
    """Pages over the budget are encoded anew with this codec, instead of being dropped. None: they are dropped."""

    placement: Placement = field(default_factory=ExpertPlacement)
    """Where a sealed page lives: "expert" (rank of the expert that its tokens activated most), "eplb" (the same, with
    experts packed anew where their pages pile up), "balanced", "hierarchical", "interleave" (page mod ranks) or "hash"
    (the paper's)."""

    lookup: Lookup = field(default_factory=ExactLookup)
    """Which pages a query visits: "exact" (all) or {"name": "quest", "budget": 0.5, ...}."""

    retention: Retention | None = None
    """Which tokens go first where `budget` is short: None (nothing ever goes), "lru", "lru_plus", "streaming", "h2o",
    "tova", "snap", "chunk", "expected", "flexgen" or "kvpress:NAME"."""

    budget: Budget = field(default_factory=UniformBudget)
    """How much each layer and KV head keeps: "uniform", "pyramid", "ada" or "duo", e.g.
    {"name": "uniform", "prompt": 0.5, "tokens": 4096}. Needs a `retention`."""

    group_size: int | None = None
    """Consecutive ranks of the expert-parallel group that share their KV: queries go to all of them, so where the
    group spans nodes, a node's ranks (8) are a good choice. None: all of the group; 1: each keeps its own."""

    capacity_tokens: int | None = None
    """Most tokens per layer that this rank's pool may hold, over all sequences. None: the pool
    grows as long as the device has memory."""

    slab_pages: int = 16
    """Pages allocated at a time when the pool grows. Larger: fewer allocations, more slack."""

    watermark: float = 0.01
    """Share of `capacity_tokens` that prompts leave free, so that running sequences can go on."""

    prefill_chunk_tokens: int | None = None
    """Longest piece of a prompt that goes through the model at once. None: whole prompts."""

    partial_dtype: str = "float32"
    """Type in which partial attention outputs travel: "float32" (exact) or "bfloat16" (half the
    bytes). Log-sum-exps are always float32."""

    backend: str = "auto"
    """Kernels: "auto" (the fastest that is there), "reference" (pure torch), "cpp" or "triton". The
    environment variable PIKV_BACKEND goes before it."""

    timeout_s: float = 120.0
    """Seconds after which a collective of the cache gives up on a silent rank."""

    trace: str | None = None
    """Folder into which each rank writes what happens to its pages, ``trace-rankN.jsonl`` (see ``pikv trace``): a line
    for each page and, with a sparse lookup, for each layer and pass. None: no trace."""

    debug: bool = False
    """Check every invariant after every step and poison unused memory. Slow."""

    def __post_init__(self) -> None:
        try:
            self._check()
        except UsageError as error:
            raise ConfigError(f"pikv.{error}") from None

    def _check(self) -> None:
        checks.choice(self, "page_size", PAGE_SIZES, f"choose one of {', '.join(map(str, PAGE_SIZES))}")
        for key in ("capacity_tokens", "prefill_chunk_tokens"):
            checks.whole_attributes(self, key, least=self.page_size, because="one page", optional=True)
        checks.whole_attributes(self, "slab_pages", most=MOST_SLAB_PAGES)
        checks.whole_attributes(self, "group_size", optional=True)
        for key, low, high in (("watermark", 0.0, 0.5), ("timeout_s", 1.0, 86400.0)):
            checks.real_attribute(self, key, low, high, f"use a number between {low:g} and {high:g}")
        for key, allowed in (("partial_dtype", PARTIAL_DTYPES), ("backend", BACKENDS)):
            checks.choice(self, key, allowed, _choices(getattr(self, key), allowed))
        checks.path(self, "trace", "name a folder, or leave it out for no trace", optional=True)
        checks.flag(self, "debug")
        kinds: dict[str, Any] = {"demote": Codec, **{key: kind for key, (kind, _) in POLICIES.items()}}
        for key, kind in kinds.items():
            value = getattr(self, key)
            if key in ("demote", "retention") and value is None:
                continue
            if not isinstance(value, kind) or isinstance(value, type):
                checks.refuse(key, value, "pass a policy, or build the configuration with from_dict")

        if self.retention is None and self.budget != UniformBudget():
            checks.refuse("retention", None, f"a budget needs to know who goes first; {_choices('', RETENTIONS)}")
        if self.demote is not None and self.retention is None:
            remedy = 'names the codec of what is over the budget; add a "retention" and a "budget"'
            checks.refuse("demote", self.demote.name, remedy)
        if self.demote is not None and self.demote in self.codec.codecs:
            checks.refuse("demote", self.demote.name, "is what pages have already; name a codec of fewer bits")
        if self.retention is not None and self.budget == UniformBudget():
            remedy = 'keeps everything without a budget; add e.g. "budget": {"name": "uniform", "prompt": 0.5}'
            checks.refuse("retention", self.retention.name, remedy)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> PiKVConfig:
        """Builds a configuration from plain JSON values. Unknown keys are errors."""
        known = [f.name for f in dataclasses.fields(cls)]
        values = _object(settings, "pikv")
        try:
            for key, value in values.items():
                if key not in known:
                    checks.refuse(key, value, f"unknown setting; {_choices(key, known)}")
            press = values.get("retention")
            if isinstance(press, str) and press.startswith("kvpress:"):
                values["retention"] = {"name": "kvpress", "press": press.partition(":")[2]}
            for key, (_, table) in POLICIES.items():
                if values.get(key) is not None:
                    values[key] = _policy(key, values[key], table)
            if values.get("demote") is not None:
                values["demote"] = parse_codec(values["demote"], "demote")
        except UsageError as error:
            raise ConfigError(f"pikv.{error}") from None
        return cls(**values)

    def files(self) -> list[str]:
        """Paths of calibration files that the policies read."""
        heads = getattr(self.budget, "heads", None)
        return [*self.codec.files(), *(self.demote.files() if self.demote else []), *([heads] if heads else [])]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict(config.to_dict()) == config`."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out["codec"] = self.codec.settings()
        out["demote"] = None if self.demote is None else self.demote.settings()
        for key in ("placement", "lookup", "budget", "retention"):
            policy = out[key]
            if policy is None:
                continue
            own = {f.name: getattr(policy, f.name) for f in dataclasses.fields(policy) if f.init}
            out[key] = {"name": policy.name, **own} if own else policy.name
        return out


def load_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file, or a `ConfigError` that names the file, the line and the cause."""
    try:
        settings = checks.read_json(path)
    except UsageError as error:
        raise ConfigError(f"{path}: {error}; name a configuration, which must be JSON") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(settings).__name__}")
    return settings


def section(settings: Mapping[str, Any], source: str | Path = "") -> dict[str, Any]:
    """A copy of the ``"pikv"`` section of a DeepSpeed configuration, empty where there is none.

    Args:
        source: where the configuration is from, for the error.
    """
    where = f"{source}: " if source else ""
    return _object(settings.get("pikv", {}), f"{where}pikv")


def load_config(path: str | Path) -> PiKVConfig:
    """The settings of a file that has them by themselves or, as DeepSpeed's, under ``"pikv"``.

    Raises:
        ConfigError: naming the file, and the key, the value and the remedy.
    """
    settings = load_json(path)
    found = section(settings, path) if "pikv" in settings else settings
    try:
        return PiKVConfig.from_dict(found)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _object(found: Any, where: str) -> dict[str, Any]:
    """A copy of an object with settings, or a `ConfigError`."""
    if not isinstance(found, Mapping):
        raise ConfigError(f"{where}: expected an object with settings, got {checks.shown(found)}")
    return dict(found)


def _policy(key: str, value: Any, table: Mapping[str, Any]) -> Any:
    """A policy from its name, or from {"name": ..., options}; instances pass through."""
    name, options = value, {}
    if isinstance(value, Mapping):
        options = {k: v for k, v in value.items() if k != "name"}
        name = value.get("name")
    elif not isinstance(value, str):
        return value
    if not isinstance(name, str) or name not in table:
        checks.refuse(f"{key}.name" if isinstance(value, Mapping) else key, name, _choices(name, table))
    kind = table[name]
    if not isinstance(kind, type):  # a codec: named by its element
        kind, options = type(kind), {"name": name, **options}
    fields = [f for f in dataclasses.fields(kind) if f.init]
    for option, setting in options.items():
        if option not in [f.name for f in fields]:
            takes = _choices(option, [f.name for f in fields]) if fields else f'"{name}" takes no options'
            raise UsageError(f"{key}.{checks.named(option)} = {checks.shown(setting)}: {takes}")
    for f in fields:
        if f.name not in options and f.default is MISSING and f.default_factory is MISSING:
            raise UsageError(f'{key}.{f.name}: missing; "{name}" needs it')
    try:
        return kind(**options)
    except UsageError as error:
        raise UsageError(f"{key}.{error}") from None


def _choices(value: Any, allowed: Iterable[Any]) -> str:
    names = [str(a) for a in allowed]
    close = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) and len(value) <= 40 else []
    hint = f'did you mean "{close[0]}"? ' if close else ""
    return f"{hint}choose one of {', '.join(names)}"
