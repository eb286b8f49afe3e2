"""`patch_model` and `patch_layer_spec`: PiKV under a Megatron model, and out again."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from megatron_patch import compat, dynamic
from megatron_patch.attachment import Attachment
from megatron_patch.checks import UnsupportedMegatronError, pair_routers
from pikv_ds.api import with_backend
from pikv_ds.config import ConfigError, PiKVConfig
from pikv_ds.core.exchange import Exchange, make_group
from pikv_ds.errors import UsageError
from pikv_ds.observe import metrics

KEY = "_pikv_attachment"


def patch_model(
    model: nn.Module,
    config: PiKVConfig | Mapping[str, Any] | None = None,
    *,
    ep_group: dist.ProcessGroup | None = None,
    static_batches: str = "auto",
) -> nn.Module:
    """Puts an expert-sharded KV cache under a built Megatron model; a second call changes nothing.

    Every rank of the job calls it at the same time. Works with static and dynamic inference contexts;
    training and passes without a context stay Megatron's.

    Args:
        model: a `GPTModel`, or a wrapper around one (`Float16Module`).
        ep_group: ranks that share their KV; by default the expert-parallel group.
        static_batches: see `Attachment`.

    Returns:
        The same model.

    Raises:
        ConfigError, UnsupportedMegatronError: by name.
        PeerError: the ranks have different settings or versions.
    """
    compat.require()
    inner = _unwrap(model)
    if KEY in inner.__dict__:
        return model
    pairs = pair_routers(inner)
    if not pairs:
        raise UnsupportedMegatronError(f"{type(inner).__name__}: no self-attention of Megatron's found in it")
    attachment = _attachment(
        config, ep_group or compat.expert_group(), next(inner.parameters()).device, static_batches
    )
    try:
        for attention, router in pairs:
            attachment.add(attention, router)
        attachment.cache  # noqa: B018 - made now, while every rank is here, so that differences show at once
    except BaseException:
        attachment.detach()
        raise
    inner.__dict__[KEY] = attachment
    dynamic.serve_dummy_passes(attachment, _attached)
    return model


def patch_context(model: nn.Module, context: Any) -> Any:
    """Takes over an inference context before its first pass; returns it. A second call changes nothing.

    A pass does it too, but then the requests of the first one have been admitted by Megatron's limits,
    and its KV buffer has been there until then. Collective for a model whose first pass is still to come.
    """
    attachment_of(model).requests_of(context)
    return context


def unpatch_model(model: nn.Module) -> nn.Module:
    """Takes PiKV out of a model; nothing of it stays. Harmless where it is not. Every rank calls it."""
    attachment = _attached(model)
    if attachment is not None:
        attachment.detach()
        for module in _unwrap(model).modules():
            module.__dict__.pop(KEY, None)
    return model


def patch_layer_spec(
    spec: Any,
    config: PiKVConfig | Mapping[str, Any] | None = None,
    *,
    ep_group: dist.ProcessGroup | None = None,
    static_batches: str = "auto",
) -> Any:
    """A copy of a layer spec (or block spec) whose layers build themselves with PiKV.

    Call it on every rank, after `initialize_model_parallel` and before the model is built from it;
    one call per model. The arguments are `patch_model`'s.
    """
    compat.require()
    attachment = _attachment(config, ep_group or compat.expert_group(), compat.device(), static_batches)
    dynamic.serve_dummy_passes(attachment, _attached)
    layers = 0

    def transform(x: Any) -> Any:
        nonlocal layers
        if isinstance(x, ModuleSpec):
            if isinstance(x.module, type) and issubclass(x.module, TransformerLayer):
                layers += 1
                return dataclasses.replace(x, module=_layer_class(x.module, attachment))
            return dataclasses.replace(x, submodules=transform(x.submodules))
        if dataclasses.is_dataclass(x) and not isinstance(x, type):  # a block's submodules
            out = copy.copy(x)
            for field in dataclasses.fields(x):
                value = getattr(x, field.name)
                new = transform(value)
                if new is not value:
                    object.__setattr__(out, field.name, new)
            return out
        if isinstance(x, list):
            return [transform(i) for i in x]
        return x

    patched = transform(spec)
    if not layers:
        attachment.exchange.close()
        raise UnsupportedMegatronError(f"{spec!r}: no TransformerLayer found in this spec")
    return patched


def _layer_class(cls: type, attachment: Attachment) -> type:
    """A transformer layer that hands its attention and router to an attachment once it is built."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        self.__class__ = cls  # it has done its work; the layer is Megatron's own
        for attention, router in pair_routers(self):
            attachment.add(attention, router)
        self.__dict__[KEY] = attachment

    return type(f"PiKV{cls.__name__}", (cls,), {"__init__": __init__, "__module__": __name__})


def attachment_of(model: nn.Module) -> Attachment:
    """The attachment of a patched model.

    Raises:
        ValueError: PiKV is not under it.
    """
    attachment = _attached(model)
    if attachment is None:
        raise UsageError("PiKV is not under this model; call megatron_patch.patch_model")
    return attachment


def stats(model: nn.Module) -> dict[str, Any]:
    """What the cache did and holds, over all ranks (`pikv_ds.stats`). Collective."""
    return metrics.stats(attachment_of(model).cache)


def flush(model: nn.Module) -> None:
    """Returns the pages of finished requests at once instead of with the next pass. Collective."""
    attachment_of(model).cache.begin_step(None, [])


def _attached(model: Any) -> Attachment | None:
    inner = _unwrap(model)
    if KEY not in inner.__dict__:  # a model built from a patched spec
        found = next((m.__dict__[KEY] for m in inner.modules() if KEY in m.__dict__), None)
        if found is not None:
            inner.__dict__[KEY] = found
    return inner.__dict__.get(KEY)


def _attachment(
    config: PiKVConfig | Mapping[str, Any] | None,
    group: dist.ProcessGroup | None,
    device: torch.device,
    static_batches: str,
) -> Attachment:
    settings = with_backend(config if isinstance(config, PiKVConfig) else PiKVConfig.from_dict(config or {}))
    if settings.retention is not None and settings.retention.name == "kvpress":
        raise ConfigError(
            f"pikv.retention = {settings.to_dict()['retention']!r}: kvpress rates with Hugging Face's modules, which "
            "are not there under Megatron; choose another retention"
        )
    several = dist.is_initialized() and dist.get_world_size() > 1
    own = make_group(group if several else None, settings.timeout_s, settings.group_size)
    return Attachment(settings, Exchange(own, device, getattr(torch, settings.partial_dtype)), static_batches)


def _unwrap(model: Any) -> nn.Module:
    """The model within Megatron's wrappers."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model
