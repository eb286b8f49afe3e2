"""Checkpoints of Hugging Face: all of the weights, or an error that says which are not there."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from pikv_ds.integrations.hf.checkpoints import CheckpointError, load_model, load_tokenizer, safetensors_files
from pikv_ds.tools import cli


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.mixtral(num_layers=2).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | settings).items() if v != "gone"}))


def without(folder: Path, wanted: Callable[[str], bool]) -> None:
    """Leaves tensors out."""
    path = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if wanted(k)}, path, {"format": "pt"})


def index(folder: Path, content: str) -> None:
    """An index instead of the one file."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)


def message(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_model(folder, torch.float32, "--model")
    text = str(error.value)
    assert text.startswith(("--model ", str(folder)))
    assert str(folder) in text
    assert len(text) < 1500
    assert "\n" not in text
    return text


def test_a_whole_checkpoint_is_the_model(folder: Path) -> None:
    ids = tiny.prompt(1, 12)
    expected, actual = tiny.mixtral(num_layers=2)(ids).logits, load_model(folder, torch.float32)(ids).logits
    assert torch.equal(actual, expected)
    assert load_model(folder, torch.bfloat16).dtype == torch.bfloat16


def test_layers_that_the_checkpoint_lacks(folder: Path) -> None:
    """transformers would draw them at random."""
    change(folder, num_hidden_layers=3)
    text = message(folder)
    assert "the checkpoint lacks model.layers.2.input_layernorm.weight, model.layers.2.mlp.experts.down_proj, " in text
    assert "and 6 more" in text
    assert "no place" not in text


def test_layers_that_the_model_lacks(folder: Path) -> None:
    """transformers would leave them out."""
    change(folder, num_hidden_layers=1)
    text = message(folder)
    assert "the model has no place for model.layers.1." in text
    assert re.search(r"and \d+ more", text)
    assert "lacks" not in text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"intermediate_size": 48}, "of another shape: model.layers.0.mlp.experts.down_proj [8, 64, 32] instead of"),
        ({"num_local_experts": 6}, "model.layers.0.mlp.gate.weight [8, 64] instead of [6, 64]"),
        ({"vocab_size": 100}, "lm_head.weight [128, 64] instead of [100, 64], model.embed_tokens.weight"),
    ],
)
def test_tensors_of_another_shape(folder: Path, settings: dict[str, Any], words: str) -> None:
    change(folder, **settings)
    assert words in message(folder)


def test_one_expert_that_is_missing(folder: Path) -> None:
    without(folder, lambda name: "layers.1.block_sparse_moe.experts.3." not in name)
    assert "model.layers.1.mlp.experts." in message(folder)


def test_a_tensor_of_its_own(folder: Path) -> None:
    without(folder, lambda name: name != "lm_head.weight")
    assert "the checkpoint lacks lm_head.weight. Use" in message(folder)
    change(folder, tie_word_embeddings=True)  # then nothing is missing
    model = load_model(folder, torch.float32)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: shutil.rmtree(f), "no such folder"),
        (lambda f: (f / "config.json").unlink(), "no config.json there"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: line 1, column 2"),
        (lambda f: (f / "config.json").write_text("[" * 10**5), "config.json: nested too deeply"),
        (lambda f: (f / "config.json").write_text("5"), "config.json: no JSON object"),
        (lambda f: change(f, model_type="gone"), "model_type"),
        (lambda f: change(f, model_type="unheard_of"), "unheard_of"),
        (lambda f: change(f, hidden_size="wide"), "hidden_size|must be tuple of ints|validat"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights there"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "incomplete or damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 99), "incomplete or damaged"),
        (lambda f: (f / "model.safetensors").rename(f / "other.safetensors"), "no weights there"),
        (lambda f: index(f, "5"), "no table of tensors and files"),
        (lambda f: index(f, '{"weight_map": {"x": "gone.safetensors"}}'), "gone.safetensors"),
    ],
)
def test_damaged_folders_are_one_line(folder: Path, damage: Callable[[Path], Any], words: str) -> None:
    damage(folder)
    assert re.search(words, message(folder))


def test_files_beside_a_model_are_not_of_it(folder: Path) -> None:
    """As transformers has it: `model.safetensors` goes before an index, and other files are not looked at."""
    expected = load_model(folder, torch.float32).state_dict()
    other = {name: x + 1 for name, x in load_file(folder / "model.safetensors").items()}
    for name in ("adapter_model.safetensors", "consolidated.safetensors", "model-00001-of-00001.safetensors"):
        save_file(other, folder / name, {"format": "pt"})
    (folder / "broken.safetensors").write_bytes(b"x")
    names = json.dumps({"weight_map": dict.fromkeys(other, "model-00001-of-00001.safetensors")})
    (folder / "model.safetensors.index.json").write_text(names)
    assert safetensors_files(folder) == [folder / "model.safetensors"]
    actual = load_model(folder, torch.float32).state_dict()
    assert all(torch.equal(actual[name], x) for name, x in expected.items())
    (folder / "model.safetensors").unlink()
    assert safetensors_files(folder) == [folder / "model-00001-of-00001.safetensors"]


def test_a_tensor_that_two_files_have_is_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "a.safetensors", {"format": "pt"})
    save_file({"model.norm.weight": tensors["model.norm.weight"] + 1}, folder / "b.safetensors", {"format": "pt"})
    files = dict.fromkeys(tensors, "a.safetensors") | {"model.norm.weight": "b.safetensors"}
    index(folder, json.dumps({"weight_map": files}))
    assert "b.safetensors: has model.norm.weight, and so has a.safetensors" in message(folder)


def test_a_file_that_was_cut_off_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    text = message(folder)
    assert text.startswith(f"{path}: ")
    assert "copy it anew" in text


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    assert len(load_tokenizer(folder)) > 90
    (folder / "tokenizer.json").write_text('{"model":')
    with pytest.raises(CheckpointError, match=r"--model .*: .*; copy the tokenizer's files"):
        load_tokenizer(folder, "--model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer there \(.*tokenizer\.json"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer there \(.*tokenizer\.json"):
        load_tokenizer(folder)


def test_a_tokenizer_of_nothing_is_none(folder: Path) -> None:
    """transformers makes an empty vocabulary of a class that it finds no file for."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(CheckpointError, match="no tokenizer there"):
        load_tokenizer(folder)


@pytest.mark.parametrize("command", ["eval", "codecs", "heads", "tune"])
def test_commands_refuse_what_is_no_model(command: str, folder: Path, tmp_path: Path, capsys: Any) -> None:
    change(folder, num_hidden_layers=3)
    out = ["--out", f"{tmp_path}/out.json"] if command in ("heads", "tune") else []
    for model, words in ((folder, "lacks model.layers.2"), (tmp_path, "no config.json there"), ("nowhere", "no such")):
        assert cli.main([command, "--model", str(model), *out]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if words in line and line.startswith(f"pikv {command}: --model {model}")]
        assert not [line for line in lines if "Traceback" in line or "MISSING" in line]
