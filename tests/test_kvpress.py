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


@pytest.mark.sampled
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


PRESSES = sorted(
    name
    for name, kind in vars(kvpress).items()
    if isinstance(kind, type) and issubclass(kind, kvpress.BasePress) and name not in ("BasePress", "ScorerPress")
)
WORK = [
    "CURPress",
    "CapPress",
    "CompactorPress",
    "ExpectedAttentionPress",
    "KeyDiffPress",
    "KnormPress",
    "LagKVPress",
    "LeverageScorePress",
    "NonCausalAttnPress",
    "PyramidKVPress",
    "RandomPress",
    "SnapKVPress",
    "StreamingLLMPress",
    "TOVAPress",
]
REFUSED = {
    "ObservedAttentionPress": "weights of eager attention.*retention h2o",
    "CriticalKVPress": "rates by another press",
    "ExpectedAttentionStatsPress": "statistics made for the model",
    "KVzapPress": "weights or statistics made for the model",
    "QFilterPress": "weights or statistics made for the model",
    "AdaKVPress": "budget ada",
    "ChunkKVPress": "retention chunk",
    "DuoAttentionPress": "budget duo",
}


@pytest.mark.parametrize("press", PRESSES)
def test_every_press_works_or_is_refused_by_name(press: str) -> None:
    model = tiny.mixtral()
    settings = {"page_size": 8, "retention": f"kvpress:{press}", "budget": {"name": "uniform", "prompt": 0.5}}
    if press not in WORK:
        why = REFUSED.get(press, "it is no scorer of tokens")
        with pytest.raises(
            pikv_ds.ConfigError, match=f"^pikv.retention.press = '{press}': .*{why}.*; choose one of cap"
        ):
            pikv_ds.attach(model, settings)
        return
    pikv_ds.attach(model, settings)
    for length in (150, 65, 64, 20, 9, 8, 5, 4, 2, 1):  # also those that the press itself calls too short
        ids = torch.randint(tiny.VOCAB, (2, length), generator=torch.Generator().manual_seed(length))
        out = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)
        assert out.shape == (2, length + 10)
    assert pikv_ds.stats(model)["dropped_pages"] > 0


@pytest.mark.parametrize("press", [5, None, ["knorm"], {}, True, "", "nothing", "base", "ScorerPress"])
def test_what_is_no_press_is_refused_in_one_line(press: object) -> None:
    settings = {"retention": {"name": "kvpress", "press": press}, "budget": {"name": "uniform", "prompt": 0.5}}
    with pytest.raises(pikv_ds.ConfigError) as error:
        pikv_ds.PiKVConfig.from_dict(settings)
    named = isinstance(press, str) and press
    remedy = "choose one of cap, compactor, cur, " if named else 'name a press of kvpress, e.g. "knorm"'
    assert str(error.value).startswith(f"pikv.retention.press = {press!r}: {remedy}")
    assert "\n" not in str(error.value)
