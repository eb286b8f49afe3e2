"""`PiKVConfig`: every setting of the cache, checked where it enters.

A configuration comes as keyword arguments or as a plain dict (`from_dict`: the ``"pikv"`` section
of a DeepSpeed JSON file). Every error names the key, the value and the remedy, so that a typo is
one line of output and not an hour of a cluster.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pikv_ds.ops import BACKENDS
from pikv_ds.policies.budgets import BUDGETS, Budget, UniformBudget
from pikv_ds.policies.codecs import CODECS, Codec, CodecPolicy, parse_codec
from pikv_ds.policies.lookups import LOOKUPS, ExactLookup, Lookup
from pikv_ds.policies.placements import PLACEMENTS, ExpertPlacement, Placement
from pikv_ds.policies.retention import RETENTIONS, Retention

PAGE_SIZES = (1, 8, 16, 32, 64, 128, 256)
PARTIAL_DTYPES = ("float32", "bfloat16")


class ConfigError(ValueError):
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
        if type(self.page_size) is not int or self.page_size not in PAGE_SIZES:
            _fail("page_size", self.page_size, f"choose one of {', '.join(map(str, PAGE_SIZES))}")
        if self.capacity_tokens is not None:
            _whole("capacity_tokens", self.capacity_tokens, at_least=self.page_size, because="one page")
        _whole("slab_pages", self.slab_pages, at_least=1)
        if self.group_size is not None:
            _whole("group_size", self.group_size, at_least=1)
        if self.prefill_chunk_tokens is not None:
            _whole(
                "prefill_chunk_tokens",
                self.prefill_chunk_tokens,
                at_least=self.page_size,
                because="one page",
            )
        _real("watermark", self.watermark, 0.0, 0.5)
        _real("timeout_s", self.timeout_s, 1.0, 86400.0)
        if self.partial_dtype not in PARTIAL_DTYPES:
            _fail("partial_dtype", self.partial_dtype, _choices(self.partial_dtype, PARTIAL_DTYPES))
        if self.backend not in BACKENDS:
            _fail("backend", self.backend, _choices(self.backend, BACKENDS))
        if self.trace is not None and (not isinstance(self.trace, str) or not self.trace):
            _fail("trace", self.trace, "name a folder, or leave it out for no trace")
        if not isinstance(self.debug, bool):
            _fail("debug", self.debug, "use true or false")
        kinds = {
            "codec": CodecPolicy,
            "placement": Placement,
            "lookup": Lookup,
            "budget": Budget,
            "retention": Retention,
        }
        for key, kind in kinds.items():
            if key == "retention" and self.retention is None:
                continue
            if not isinstance(getattr(self, key), kind) or isinstance(getattr(self, key), type):
                _fail(
                    key,
                    getattr(self, key),
                    "pass a policy, or build the configuration with from_dict",
                )

        if self.retention is None and self.budget != UniformBudget():
            _fail("retention", None, f"a budget needs to know who goes first; {_choices('', RETENTIONS)}")
        if self.demote is not None and not isinstance(self.demote, Codec):
            _fail("demote", self.demote, "pass a codec, or build the configuration with from_dict")
        if self.demote is not None and self.retention is None:
            remedy = 'names the codec of what is over the budget; add a "retention" and a "budget"'
            _fail("demote", self.demote.name, remedy)
        if self.demote is not None and self.demote in self.codec.codecs:
            _fail("demote", self.demote.name, "is what pages have already; name a codec of fewer bits")
        if self.retention is not None and self.budget == UniformBudget():
            remedy = 'keeps everything without a budget; add e.g. "budget": {"name": "uniform", "prompt": 0.5}'
            _fail("retention", self.retention.name, remedy)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> PiKVConfig:
        """Builds a configuration from plain JSON values. Unknown keys are errors."""
        if not isinstance(settings, Mapping):
            raise ConfigError(f"pikv: expected an object with settings, got {settings!r}")
        known = [f.name for f in dataclasses.fields(cls)]
        values: dict[str, Any] = {}
        for key, value in settings.items():
            if key not in known:
                _fail(key, value, f"unknown setting; {_choices(key, known)}")
            values[key] = value
        tables: dict[str, Mapping[str, Any]] = {
            "codec": CODECS,
            "placement": PLACEMENTS,
            "lookup": LOOKUPS,
            "budget": BUDGETS,
            "retention": RETENTIONS,
        }
        for key, table in tables.items():
            if values.get(key) is None:
                continue
            if key == "retention" and isinstance(values[key], str) and values[key].startswith("kvpress:"):
                values[key] = {"name": "kvpress", "press": values[key].partition(":")[2]}
            values[key] = _policy(key, values[key], table)
        if values.get("demote") is not None:
            try:
                values["demote"] = parse_codec(values["demote"], "pikv.demote")
            except ValueError as error:
                raise ConfigError(str(error)) from None
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
        settings = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; pass the path of a JSON configuration") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: line {error.lineno}: {error.msg}; the file must be JSON") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}; pass the path of a JSON configuration") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(settings).__name__}")
    return settings


def name_or_json(option: str, text: str) -> Any:
    """A policy as it is written on a command line: ``int4``, or ``{"name": "int4", "rotate": true}``.

    Raises:
        ValueError: naming the option.
    """
    try:
        return json.loads(text) if text.lstrip().startswith("{") else text
    except json.JSONDecodeError as error:
        raise ValueError(f"--{option} {text}: {error.msg}; write a name or a JSON object") from None


def _policy(key: str, value: Any, table: Mapping[str, Any]) -> Any:
    """A policy from its name, or from {"name": ..., options}; instances pass through."""
    name, options = value, {}
    if isinstance(value, Mapping):
        options = {k: v for k, v in value.items() if k != "name"}
        name = value.get("name")
    elif not isinstance(value, str):
        return value
    if not isinstance(name, str) or name not in table:
        _fail(f"{key}.name" if isinstance(value, Mapping) else key, name, _choices(name, table))
    kind = table[name]
    if not isinstance(kind, type):  # a codec: named by its element
        kind, options = type(kind), {"name": name, **options}
    allowed = [f.name for f in dataclasses.fields(kind) if f.init]
    for option, setting in options.items():
        if option not in allowed:
            takes = _choices(option, allowed) if allowed else f'"{name}" takes no options'
            _fail(f"{key}.{option}", setting, takes)
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"pikv.{key}.{error}") from None


def _choices(value: Any, allowed: Any) -> str:
    names = [str(a) for a in allowed]
    close = difflib.get_close_matches(str(value), names, n=1)
    hint = f'did you mean "{close[0]}"? ' if close else ""
    return f"{hint}choose one of {', '.join(names)}"


def _fail(key: str, value: Any, remedy: str) -> None:
    raise ConfigError(f"pikv.{key} = {value!r}: {remedy}")


def _whole(key: str, value: Any, at_least: int, because: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        _fail(
            key,
            value,
            f"use a whole number of at least {at_least}" + (f" ({because})" if because else ""),
        )


def _real(key: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        _fail(key, value, f"use a number between {low:g} and {high:g}")
