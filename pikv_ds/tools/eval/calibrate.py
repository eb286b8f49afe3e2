"""Bases for `Codec.projections`, fitted to a text; and what any codec loses of it.

The keys are those of the cache, with their rotary positions. Rotations mix the two channels of a pair only, so over
many positions the covariance of a pair's channels becomes round, and a principal basis keeps or drops pairs by their
energy; pairs that turn slowly keep their direction and compress further. That costs rank against keys without
positions (as Palu keeps them), and saves rebuilding every key in every step.

Methods:

* `lowrank`: principal directions of keys and of values, per layer and KV head.
* `distilled`: of all projections of the rank those that change the attention's logits and the layer's output the
  least: with S = E[q q'] over the queries of a head's group, ``E (q . (k - k'))^2`` is least for the principal
  directions of ``S^1/2 k`` (the same for values, with ``W_o' W_o`` of the output projection in the place of S).
* `lora`: full rank, encoded as a codec encodes it, and read with a learned correction of low rank on top
  (``k' = k^ + k^ U V'``, by reduced-rank regression of what the codec has lost), for codecs of few bits. Regression
  shrinks keys, which flattens the attention; so a layer corrects its keys, its values, both or neither, whichever
  leaves the least error in the attention's output on the text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pikv_ds.errors import UsageError
from pikv_ds.layout import PageLayout
from pikv_ds.ops import reference
from pikv_ds.ops.projections import Projections
from pikv_ds.policies.codecs import Codec
from pikv_ds.tools.eval.snapshot import LayerInputs, Snapshot

METHODS = ("lowrank", "distilled", "lora")
RIDGE = 1e-4
"""Share of the mean variance that is added to every direction before anything is inverted."""
QUERIES = 256
"""Last tokens of a text whose attention is compared."""


@dataclass(frozen=True)
class Errors:
    """What a layer loses, each relative to the norm of what there was."""

    keys: float
    values: float
    output: float


def fit(snapshot: Snapshot, method: str, rank: int, codec: Codec, page_size: int) -> list[Projections]:
    """Bases of all layers.

    Args:
        rank: of keys and values; of `lora`, of the correction.
        codec: how coefficients are stored (`lora` corrects it; its rotation stays).

    Raises:
        ValueError: an unknown method, or a rank that the head size does not have.
    """
    size = snapshot.layers[0].key.shape[-1]
    if method not in METHODS:
        raise UsageError(f"--method {method}: choose of {', '.join(METHODS)}")
    if not 1 <= rank <= size:
        raise UsageError(f"--rank {rank}: use 1 to {size}, the head size")
    if method == "lora":
        return [_lora(layer, rank, codec, page_size, index) for index, layer in enumerate(snapshot.layers)]
    out = []
    for layer in snapshot.layers:
        key, value = layer.key[0].double(), layer.value[0].double()  # [K, n, D]
        if method == "lowrank":
            bases = (_principal(_second_moment(x), rank) for x in (key, value))
            out.append(Projections.of_bases(*(b.float() for b in bases)))
            continue
        query = layer.query[0].double().unflatten(0, (len(key), -1)).flatten(1, 2)  # [K, G * n, D]
        outwards = layer.module.get_parameter("o_proj.weight").detach().double()  # [hidden, H * D]
        by_head = outwards.unflatten(1, (len(key), -1, size))  # [hidden, K, G, D]
        weights = torch.einsum("ikgd,ikge->kde", by_head, by_head)
        pairs = (
            _weighted(_second_moment(key), _second_moment(query), rank),
            _weighted(_second_moment(value), weights, rank),
        )
        out.append(Projections(*(x.float() for pair in pairs for x in pair)))
    return out


def _second_moment(x: Tensor) -> Tensor:
    """``[K, D, D]`` of ``[K, n, D]``."""
    return x.transpose(1, 2) @ x / x.shape[1]


def _principal(moment: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors, ``[K, D, rank]``."""
    return torch.linalg.eigh(moment).eigenvectors.flip(-1)[..., :rank]


def _weighted(moment: Tensor, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Encode and read, ``[K, D, rank]``: the projection whose error weighs the least in the metric `weight`."""
    values, vectors = torch.linalg.eigh(weight)
    values = values.clamp(min=0) + RIDGE * values.mean(-1, keepdim=True)
    root = vectors * values.sqrt()[:, None] @ vectors.transpose(1, 2)
    inverse = vectors / values.sqrt()[:, None] @ vectors.transpose(1, 2)
    basis = _principal(root @ moment @ root, rank)
    return root @ basis, inverse @ basis


def _lora(layer: LayerInputs, rank: int, codec: Codec, page_size: int, index: int) -> Projections:
    size, heads = layer.key.shape[-1], layer.key.shape[1]
    bases = codec.bases(index + 1, heads, size, layer.key.device)
    eye = torch.eye(size).expand(heads, -1, -1)
    base = bases[index] if bases else Projections.of_bases(eye, eye)
    layout = codec.layout(heads, size, page_size, layer.key.dtype)
    stored = through(layout, base, layer.key, layer.value)
    corrected = []
    for x, back, read in zip((layer.key, layer.value), stored, (base.key_read, base.value_read), strict=True):
        have = back.double()  # [K, n, D]
        lost = x[0, :, : back.shape[1]].double() - have
        moment = _second_moment(have)
        moment = moment + RIDGE * moment.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * torch.eye(size).double()
        full = torch.linalg.solve(moment, have.transpose(1, 2) @ lost / have.shape[1])  # [K, D, D]
        fitted = have @ full
        top = _principal(_second_moment(fitted), rank)
        correction = torch.eye(size).double() + full @ top @ top.transpose(1, 2)  # k' = k^ @ correction
        corrected.append((correction.transpose(1, 2) @ read.double()).float())
    choices = [
        Projections(base.key_encode, key_read, base.value_encode, value_read)
        for key_read in (base.key_read, corrected[0])
        for value_read in (base.value_read, corrected[1])
    ]
    return min(choices, key=lambda bases: _layer_errors(layer, layout, bases).output)


def through(layout: PageLayout, bases: Projections | None, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[1, K, n, D]`` as attention meets them after pages: float32 ``[K, full pages * S, D]``."""
    pages = key.shape[2] // layout.page_size
    keys, values = (
        x[0, :, : pages * layout.page_size].unflatten(1, (pages, -1)).transpose(0, 1) for x in (key, value)
    )
    if bases is not None:
        keys, values = bases.encode(keys, values)
    encoded = torch.empty(pages, layout.page_bytes, dtype=torch.uint8)
    reference.seal_pages(keys, values, layout, encoded, None, torch.zeros(1, dtype=torch.int32))
    got = reference.unseal_pages(encoded, layout)
    reads = (None, None) if bases is None else (bases.key_read, bases.value_read)
    back = (x if r is None else x @ r.transpose(1, 2) for x, r in zip(got, reads, strict=True))
    first, second = (x.transpose(0, 1).flatten(1, 2) for x in back)
    return first, second


def errors(snapshot: Snapshot, codec: Codec, page_size: int) -> tuple[list[Errors], float]:
    """What each layer loses by a codec, and the bytes of its pages over those of plain ones.

    The output is that of the attention of the last `QUERIES` tokens over all full pages, with the model's own queries.
    """
    first = snapshot.layers[0]
    heads, size = first.key.shape[1], first.key.shape[-1]
    bases = codec.bases(len(snapshot.layers), heads, size, first.key.device)
    key_rank, value_rank = (bases[0].key_read.shape[2], bases[0].value_read.shape[2]) if bases else (size, None)
    layout = codec.layout(heads, key_rank, page_size, first.key.dtype, None, value_rank)
    plain = Codec("none").layout(heads, size, page_size, first.key.dtype)
    out = []
    for index, layer in enumerate(snapshot.layers):
        out.append(_layer_errors(layer, layout, bases[index] if bases else None))
    return out, layout.page_bytes / plain.page_bytes


def _layer_errors(layer: LayerInputs, layout: PageLayout, bases: Projections | None) -> Errors:
    keys, values = through(layout, bases, layer.key, layer.value)
    true_keys, true_values = (x[0, :, : keys.shape[1]].float() for x in (layer.key, layer.value))
    query = layer.query[0, :, -QUERIES:].float()
    outputs = [_attention(query, k, v, layer.scale) for k, v in ((true_keys, true_values), (keys, values))]
    return Errors(
        float((keys - true_keys).norm() / true_keys.norm()),
        float((values - true_values).norm() / true_values.norm()),
        float((outputs[1] - outputs[0]).norm() / outputs[0].norm()),
    )


def _attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Outputs ``[K, G, T, D]`` of queries ``[H, T, D]`` over all keys ``[K, n, D]``."""
    grouped = query.unflatten(0, (len(keys), -1))
    weights = (torch.einsum("kgtd,knd->kgtn", grouped, keys) * scale).softmax(-1)
    return torch.einsum("kgtn,knd->kgtd", weights, values)


def save(path: str, projections: list[Projections], metadata: dict[str, str]) -> None:
    """Writes bases as `Codec.projections` reads them."""
    from safetensors.torch import save_file

    tensors = {f"{i}.{name}": x.contiguous().clone() for i, p in enumerate(projections) for name, x in vars(p).items()}
    save_file(tensors, path, metadata)


def prompt_ids(tokenizer: object, texts: list[str], num_tokens: int) -> Tensor:
    """The first tokens of some texts, as many of each, ``[1, n]``."""
    encode: Callable[..., object] = tokenizer  # type: ignore[assignment]
    share = num_tokens // len(texts)
    ids = [i for text in texts for i in encode(text[: 12 * share], add_special_tokens=False).input_ids[:share]]  # type: ignore[attr-defined]
    if not ids:
        raise UsageError("--text: no tokens in it")
    return torch.tensor([ids])
