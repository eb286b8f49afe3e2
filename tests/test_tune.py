"""`pikv tune` and `pikv heads`: objectives, fronts, files that reproduce what was chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_eval import checkpoint, tokenizer  # noqa: F401  (fixtures)

from pikv_ds import PiKVConfig
from pikv_ds.tools import cli
from pikv_ds.tools.eval import heads, tasks
from pikv_ds.tools.eval.tune import Objective, Point, front


def point(name: str, latency: float, memory: float, fidelity: float) -> Point:
    return Point(name, {}, latency, memory, fidelity, 1.0)


def test_an_objective_is_arithmetic() -> None:
    at = point("a", 2.0, 0.5, 0.9)
    assert Objective("latency + 0.2*memory - 5*fidelity").of(at) == pytest.approx(2 + 0.1 - 4.5)
    assert Objective("1 / (1 - latency)").of(point("exact", 1.0, 1.0, 1.0)) == float("inf")  # never the least
    assert Objective("-fidelity**2 / memory").of(at) == pytest.approx(-0.81 / 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [("latency +", "write sums"), ("speed", "no 'speed'"), ("__import__('os')", "no Call"), ("3", "names none"),
     ("latency if memory else 1", "no IfExp"), ("latency.real", "no Attribute"), ("'a' + latency", "no 'a'"),
     ("9**9**9*latency", "has no value at"), ("1/(latency-latency)", "has no value at"), ("True*latency", "no True"),
     ("-" * 10**5 + "latency", "at most 500 characters"), ("1e999*latency", "no number as large"),
     ("9" * 450 + "*latency", "no number as large"), ("latency\0", "null bytes|source code")],
)  # fmt: skip
def test_anything_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(text)


def test_the_front_is_what_nothing_beats() -> None:
    good = [point("exact", 1, 1, 1), point("small", 1.1, 0.25, 0.9), point("fast", 0.5, 1, 0.8)]
    beaten = [point("slower", 1.2, 0.25, 0.9), point("worse", 1, 1, 0.99)]
    assert [p.name for p in front(good + beaten)] == ["small", "fast", "exact"]
    twins = [point("a", 1, 1, 1), point("b", 1, 1, 1)]
    assert front(twins) == twins


def test_the_command_writes_a_configuration_that_says_what_it_measured(checkpoint: Path, capsys) -> None:  # noqa: F811
    base = {"expert_parallel": {"enabled": True}, "pikv": {"slab_pages": 4}}
    (checkpoint / "base.json").write_text(json.dumps(base))
    arguments = [
        "tune", "--model", f"{checkpoint}/model", "--dtype", "float32", "--text", f"{checkpoint}/prose.txt",
        "--lengths", "400", "--cases", "1", "--threads", "1", "--config", f"{checkpoint}/base.json",
        "--codecs", "none", "int8", "int2", "--lookups", "exact", "--page-sizes", "16",
        "--out", f"{checkpoint}/tuned.json", "--plot", f"{checkpoint}/tuned.png",
    ]  # fmt: skip
    assert cli.main([*arguments, "--objective", "memory - 1000*fidelity"]) == 0
    assert "Pareto front of 3 settings" in capsys.readouterr().out
    tuned = json.loads((checkpoint / "tuned.json").read_text())
    assert tuned["expert_parallel"] == base["expert_parallel"]
    config = PiKVConfig.from_dict(tuned["pikv"])
    assert (config.slab_pages, config.page_size) == (4, 16)
    assert config.codec.name in ("none", "int8")  # the random model's best guesses decide which
    figures = tuned["pikv_tuned"]
    assert 0 < figures["memory"] <= 1.2
    assert figures["fidelity"] > 0.9
    assert figures["value"] == pytest.approx(figures["memory"] - 1000 * figures["fidelity"], abs=0.1)
    assert (checkpoint / "tuned.png").stat().st_size > 5000
    assert cli.main([*arguments, "--objective", "memory"]) == 0
    assert json.loads((checkpoint / "tuned.json").read_text())["pikv"]["codec"] == "int2"
    for wrong, message in ((["--objective", "speed"], "--objective"), (["--codecs", "int5"], "pikv.codec")):
        assert cli.main([*arguments, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_a_head_that_looks_at_the_needle_is_found() -> None:
    """A case whose answer tokens have the key that one head asks for: that head gets the highest score."""
    model: Any = tiny.llama(num_layers=2)
    ids = torch.randint(10, tiny.VOCAB, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    case = tasks.Case("needle", "5", ids, ids[50:], ("7",), 50, 0.5, needle=(20, 30))

    def encode(text: str, add_special_tokens: bool = False) -> Any:
        return type("Encoding", (), {"input_ids": [3, 4]})

    scores = heads.probe(model, encode, [case], lambda: None)
    assert scores.shape == (2, 2)
    wide = heads.probe(model, encode, [tasks.Case("needle", "5", ids, ids[50:], ("7",), 50, 0.5, needle=(0, 61))], int)
    assert ((scores > 0) & (scores < wide)).all()
    assert (wide > 0.98).all()  # all that the answer's tokens can see but the last one
    chosen = heads.classes(scores, 0.5)
    assert chosen.sum() == 2
    assert scores[chosen].min() >= scores[~chosen].max()


def test_heads_of_a_checkpoint_become_a_budget(checkpoint: Path, capsys) -> None:  # noqa: F811
    out = checkpoint / "heads.json"
    arguments = ["heads", "--model", f"{checkpoint}/model", "--dtype", "float32", "--text", f"{checkpoint}/prose.txt"]
    arguments += ["--lengths", "400", "--cases", "2", "--threads", "1", "--out", str(out), "--share", "0.25"]
    assert cli.main([*arguments, "--plot", f"{checkpoint}/heads.png"]) == 0
    assert "1 retrieval heads of 4" in capsys.readouterr().out
    assert sum(map(sum, json.loads(out.read_text())["retrieval"])) == 1
    config = PiKVConfig.from_dict({"retention": "streaming", "budget": {"name": "duo", "heads": str(out)}})
    assert config.files() == [str(out)]
    assert cli.main([*arguments, "--share", "0"]) == 2
    assert "--share: 0" in capsys.readouterr().err
