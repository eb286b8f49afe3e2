"""Retention by the scores of NVIDIA's kvpress keeps what kvpress itself keeps."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_retention import contents
from transformers import DynamicCache

import pikv_ds
from pikv_ds.api import attachment_of

kvpress = pytest.importorskip("kvpress")


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("press", ["knorm", "snapkv", "keydiff", "expected_attention", "tova"])
@pytest.mark.parametrize("share", [0.5, 0.25])
def test_the_same_tokens_are_kept_as_by_kvpress(kind: str, press: str, share: float) -> None:
    model = tiny.MODELS[kind]()
    ids = torch.randint(tiny.VOCAB, (1, 150), generator=torch.Generator().manual_seed(1))
    theirs = DynamicCache()
    kinds = {
        "knorm": kvpress.KnormPress,
        "snapkv": kvpress.SnapKVPress,
        "keydiff": kvpress.KeyDiffPress,
        "expected_attention": kvpress.ExpectedAttentionPress,
        "tova": kvpress.TOVAPress,
    }
    settings = {"page_size": 1, "backend": "reference", "retention": f"kvpress:{press}"}
    pikv_ds.attach(model, settings | {"budget": {"name": "uniform", "prompt": share}})
    cache = pikv_ds.new_cache(model)
    with torch.inference_mode():
        model.model(ids, past_key_values=cache)
    store = attachment_of(model).store
    kept = [contents(store, 0, layer) for layer in range(store.shape.num_layers)]
    cache.release()
    pikv_ds.detach(model)
    with torch.inference_mode(), kinds[press](compression_ratio=1 - share)(model):
        model.model(ids, past_key_values=theirs)
    for layer in range(store.shape.num_layers):
        for head, (keys, values) in enumerate(kept[layer]):
            other = theirs.layers[layer].keys[0, head], theirs.layers[layer].values[0, head]
            assert len(keys) == len(other[0]) == int(150 * share)
            assert {tuple(k) for k in keys.tolist()} == {tuple(k) for k in other[0].tolist()}
            assert {tuple(v) for v in values.tolist()} == {tuple(v) for v in other[1].tolist()}
