"""Bases fitted to a text, and the errors that codecs report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_eval import checkpoint, tokenizer  # noqa: F401  (fixtures)

import pikv_ds
from pikv_ds.policies.codecs import CODECS, Codec
from pikv_ds.tools import cli
from pikv_ds.tools.eval import calibrate
from pikv_ds.tools.eval.snapshot import Snapshot, take

LENGTH, SIZE = 400, 16


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    ids = torch.randint(tiny.VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(2))
    return take(tiny.llama(num_layers=2), ids)


def error_of(snapshot: Snapshot, codec: Codec, tmp_path: Path, bases: Any) -> list[calibrate.Errors]:
    path = str(tmp_path / "bases.safetensors")
    calibrate.save(path, bases, {})
    return calibrate.errors(snapshot, Codec(codec.name, codec.values, projections=path), 8)[0]


@pytest.mark.parametrize("method", ["lowrank", "distilled"])
def test_full_rank_loses_nothing_and_less_rank_loses_more(snapshot: Snapshot, method: str, tmp_path: Path) -> None:
    found = []
    for rank in (16, 12, 8, 4):
        bases = calibrate.fit(snapshot, method, rank, CODECS["none"], 8)
        found.append(error_of(snapshot, CODECS["none"], tmp_path, bases))
    assert all(e.keys < 1e-3 and e.values < 1e-3 and e.output < 1e-3 for e in found[0])
    outputs = [sum(e.output for e in layers) for layers in found]
    assert outputs == sorted(outputs)


def test_principal_bases_are_the_best_for_keys_and_distilled_ones_for_logits(snapshot: Snapshot) -> None:
    plain, distilled = (calibrate.fit(snapshot, m, 8, CODECS["none"], 8) for m in ("lowrank", "distilled"))
    for layer, a, b in zip(snapshot.layers, plain, distilled, strict=True):
        keys, query = layer.key[0].float(), layer.query[0].float().unflatten(0, (2, -1))
        lost = [keys - keys @ p.key_encode @ p.key_read.transpose(1, 2) for p in (a, b)]
        logits = [float(torch.einsum("kgtd,knd->kgtn", query, x).square().sum()) for x in lost]
        assert float(lost[0].norm()) <= float(lost[1].norm()) * (1 + 1e-5)
        assert logits[1] <= logits[0] * (1 + 1e-3)


def test_a_correction_never_makes_the_text_worse(snapshot: Snapshot, tmp_path: Path) -> None:
    for codec in (Codec("int2"), Codec("int2", rotate=True)):
        bases = calibrate.fit(snapshot, "lora", 4, codec, 8)
        before, _ = calibrate.errors(snapshot, codec, 8)
        after = error_of(snapshot, codec, tmp_path, bases)
        assert all(a.output <= b.output * (1 + 1e-4) for a, b in zip(after, before, strict=True))
    assert any(a.output < 0.98 * b.output for a, b in zip(after, before, strict=True))


def test_errors_fall_with_bits_and_bytes_are_those_of_the_layout(snapshot: Snapshot) -> None:
    found = {name: calibrate.errors(snapshot, CODECS[name], 8) for name in ("none", "int8", "int4", "int3", "int2")}
    outputs = [sum(e.output for e in layers) for layers, _ in found.values()]
    assert outputs[0] == 0
    assert outputs == sorted(outputs)
    layout = CODECS["int4"].layout(2, SIZE, 8, torch.float32)
    assert found["int4"][1] == layout.page_bytes / (2 * 2 * 8 * SIZE * 4)


@pytest.mark.parametrize(
    ("method", "rank", "message"), [("lowrnk", 4, "--method lowrnk"), ("lowrank", 17, "--rank 17")]
)
def test_what_cannot_be_fitted_is_refused(snapshot: Snapshot, method: str, rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate.fit(snapshot, method, rank, CODECS["none"], 8)


def test_the_commands_and_a_model_with_their_file(checkpoint: Path, capsys) -> None:  # noqa: F811
    common = ["--model", f"{checkpoint}/model", "--dtype", "float32", "--text", f"{checkpoint}/prose.txt"]
    common += ["--tokens", "400", "--page-size", "8", "--threads", "1"]
    path = f"{checkpoint}/bases.safetensors"
    assert cli.main(["calibrate", *common, "--rank", "8", "--out", path]) == 0
    shown = " ".join(capsys.readouterr().out.split())  # a title is broken where the path in it is long
    assert "distilled, rank 8, 0.500 of plain pages" in shown
    setting = {"name": "int8", "projections": path}
    assert cli.main(["codecs", *common, "--codec", "int4", "--codec", str(setting).replace("'", '"')]) == 0
    assert "projections" in capsys.readouterr().out
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(f"{checkpoint}/model").eval()
    pikv_ds.attach(model, {"codec": {"name": "none", "projections": path}, "page_size": 8, "debug": True})
    ids = torch.randint(50, (2, 40))
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 52)
    assert pikv_ds.stats(model)["page_bytes"] == 2 * 2 * 8 * 8 * 4
    pikv_ds.detach(model)
    assert cli.main(["calibrate", *common, "--method", "pca", "--out", path]) == 2
    assert "--method pca: choose of lowrank" in capsys.readouterr().err
