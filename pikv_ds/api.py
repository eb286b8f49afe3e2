"""The front door: `initialize`, `attach`, `detach`, `stats`. Puts the core and an integration together."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from pikv_ds import launch_env
from pikv_ds.config import ConfigError, PiKVConfig, section
from pikv_ds.core import trace
from pikv_ds.core.cache import ExpertShardedKVCache, ModelShape
from pikv_ds.core.exchange import Exchange, make_group
from pikv_ds.errors import PeerError, UsageError
from pikv_ds.integrations.routers import find_choices, same_number
from pikv_ds.observe import metrics
from pikv_ds.ops import BACKENDS
from pikv_ds.version import __version__

if TYPE_CHECKING:
    from pikv_ds.integrations.hf.attachment import Attachment, PiKVCache
    from pikv_ds.observe.prometheus import Server

_KEY = "_pikv_attachment"


def initialize(model: nn.Module, config: Mapping[str, Any], **kwargs: Any) -> Any:
    """`deepspeed.initialize` with expert parallelism, and PiKV under the model.

    Args:
        model: a Hugging Face MoE model with all its experts, on every rank.
        config: DeepSpeed's configuration with a ``"pikv"`` section (see `PiKVConfig`).
        kwargs: passed on to `deepspeed.initialize`.

    Returns:
        The DeepSpeed engine; generate with ``engine.module.generate``.

    Raises:
        ConfigError: a setting that cannot work, with its key, value and remedy.
    """
    settings = PiKVConfig.from_dict(section(config))
    from pikv_ds.integrations import deepspeed
    from pikv_ds.integrations.hf import attachment as hf

    hf.check_supported(model)
    engine = deepspeed.initialize(model, config, settings.timeout_s, **kwargs)
    attachment = attach(engine, settings)
    if getattr(getattr(engine, "monitor", None), "enabled", False):  # of DeepSpeed's configuration
        from pikv_ds.observe.prometheus import Watcher, monitor_events

        watcher = Watcher(then=lambda figures: engine.monitor.write_events(monitor_events(figures)))
        attachment.store.watchers.append(watcher)
    return engine


def attach(
    model: Any,
    config: PiKVConfig | Mapping[str, Any] | None = None,
    ep_group: dist.ProcessGroup | None = None,
) -> Attachment:
    """Puts an expert-sharded KV cache under a model that is already parallelised.

    Args:
        model: a transformers model, or a DeepSpeed engine around one.
        config: settings; the defaults if None.
        ep_group: ranks that share their KV; by default the expert-parallel group of the model's
            MoE layers. Without any process group the cache works on one rank.

    Raises:
        ConfigError, ValueError: an unsupported model or setting, by name.
        PeerError: the ranks have different settings or versions.
    """
    settings = with_backend(config if isinstance(config, PiKVConfig) else PiKVConfig.from_dict(config or {}))
    from pikv_ds.integrations.hf import attachment as hf

    module = _module(model)
    if _KEY in module.__dict__:
        raise UsageError("PiKV is already attached to this model; detach it first")
    hf.check_supported(module)
    choices, group = find_choices(module), ep_group
    if "deepspeed" in sys.modules:
        from pikv_ds.integrations import deepspeed

        choices = deepspeed.choices(module) or choices
        group = group or deepspeed.expert_group(module)
    world = dist.get_world_size() if dist.is_initialized() else 1
    if group is None and world > 1:
        raise UsageError(
            "the model has no expert-parallel layers; name the ranks that share KV: attach(..., ep_group=…)"
        )
    device = next(module.parameters()).device
    kv_group = make_group(group if world > 1 else None, settings.timeout_s, settings.group_size)
    exchange = Exchange(kv_group, device, getattr(torch, settings.partial_dtype))

    def make_store(shape: ModelShape) -> ExpertShardedKVCache:
        compare(exchange, settings, shape)
        return ExpertShardedKVCache(shape, settings, exchange, device)

    try:
        experts = same_number(choices.values()) or exchange.size
        attachment = hf.Attachment(module, make_store, choices, experts)
    except BaseException:
        exchange.close()
        raise
    module.__dict__[_KEY] = attachment
    return attachment


def detach(model: Any) -> None:
    """Takes PiKV out of a model again; nothing of it stays. Harmless where it is not attached.

    Every rank calls it; the process group of the cache goes, too.
    """
    attachment = _module(model).__dict__.pop(_KEY, None)
    if attachment is not None:
        attachment.detach()
        attachment.store.exchange.close()


def new_cache(model: Any) -> PiKVCache:
    """An empty cache for one batch, to pass as ``past_key_values`` and keep over several calls."""
    return attachment_of(model).new_cache()


def stats(model: Any) -> dict[str, Any]:
    """What the cache did and holds, over all ranks. Collective: call it on every rank."""
    return metrics.stats(attachment_of(model).store)


def serve_metrics(model: Any, port: int = 9400, interval_s: float = 1.0, address: str = "127.0.0.1") -> Server:
    """Shows this rank's figures to Prometheus under ``http://address:port/metrics``, until `Server.close`.

    Args:
        model: a model or engine with PiKV attached.
        port: another one for each rank of a machine; 0 takes a free one.
        interval_s: least time between two readings of the cache.
        address: of this machine, to listen on. By default only a Prometheus on this machine reaches it; "0.0.0.0" is
            for all that reach the machine.

    Raises:
        ValueError: PiKV is not attached, prometheus_client is missing, or the address or port cannot be listened on.
    """
    from pikv_ds.observe import prometheus

    return prometheus.serve(attachment_of(model).store, port, interval_s, address)


def attachment_of(model: Any) -> Attachment:
    """The attachment of a model or engine.

    Raises:
        ValueError: PiKV is not attached.
    """
    attachment = _module(model).__dict__.get(_KEY)
    if attachment is None:
        raise UsageError("PiKV is not attached to this model; call pikv_ds.attach or pikv_ds.initialize")
    return attachment


def _module(model: Any) -> nn.Module:
    """The transformers model in an engine, a compiled module or another wrapper."""
    if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # of torch.compile
        return _module(inner)
    while not hasattr(model, "generate") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    inner = getattr(model, "module", None)
    return inner if isinstance(inner, nn.Module) and hasattr(inner, "generate") else model


def with_backend(config: PiKVConfig) -> PiKVConfig:
    """The configuration with the backend that PIKV_BACKEND names, if it does."""
    backend = launch_env.backend()
    if backend is None:
        return config
    if backend not in BACKENDS:
        raise ConfigError(f"PIKV_BACKEND = {backend!r}: choose one of {', '.join(BACKENDS)}, or unset it")
    return dataclasses.replace(config, backend=backend)


def compare(exchange: Exchange, config: PiKVConfig, shape: ModelShape) -> None:
    """All ranks must mean the same thing before they share a cache.

    Raises:
        PeerError: naming the ranks and what differs.
    """
    files = {f"file {path}": _digest(path) for path in config.files()}
    if config.trace is not None:
        files["trace"] = trace.obstacle(config.trace) or config.trace
    mine = {"version": __version__, "torch": torch.__version__, **config.to_dict(), **vars(shape), **files}
    texts = exchange.all_gather_text(json.dumps(mine, default=str, sort_keys=True))
    first = json.loads(texts[0] or "{}")
    for rank, text in enumerate(texts):
        other = json.loads(text or "{}")
        different = [k for k in first if first[k] != other.get(k)]
        if different:
            key = different[0]
            raise PeerError(
                f"ranks 0 and {rank} differ in {', '.join(different)} ({key}: {first[key]!r} and {other.get(key)!r}); "
                "start all ranks with the same configuration, model and versions"
            )


def _digest(path: str) -> str:
    """A file's SHA-256, or why it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError as error:
        return str(error)


__all__ = ["ConfigError", "attach", "attachment_of", "detach", "initialize", "new_cache", "serve_metrics", "stats"]
