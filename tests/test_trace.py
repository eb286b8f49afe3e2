"""The trace of page events: what it tells is what the cache has counted, and pictures can be made of it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from passes import PAGE, Driver, make_cache

from pikv_ds.config import ConfigError, PiKVConfig
from pikv_ds.core.reuse import DISTANCES
from pikv_ds.core.trace import RankTrace, read
from pikv_ds.observe.metrics import rank_stats
from pikv_ds.tools.cli import main
from pikv_ds.tools.trace_command import homes

SPARSE = {"lookup": {"name": "quest", "budget": 0.3}}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sparse": SPARSE,
    "evicting": {"retention": "h2o", "budget": {"name": "uniform", "tokens": 6 * PAGE}},
    "demoting": {"retention": "lru", "budget": {"name": "uniform", "tokens": 6 * PAGE}, "demote": "int4"},
    "per head": {"retention": "h2o", "budget": {"name": "ada", "prompt": 0.5, "tokens": 8 * PAGE}},
}


def run(folder: Path, rng: torch.Generator, **settings: Any) -> tuple[Any, RankTrace]:
    """Some passes of three sequences, one of which ends; the cache, and what its trace tells."""
    lossy = settings.keys() & {"lookup", "retention"}
    cache = make_cache(trace=str(folder), **settings)
    driver = Driver(cache, cache.new_batch(3), rng, tolerance=torch.inf if lossy else 1e-5)
    driver.pass_of([70, 41, 9])
    for i in range(40):
        driver.step(1)
        if i == 20:
            driver.release([1])
    trace = cache.shard.trace
    assert trace is not None
    trace.step(cache.num_steps + 1, cache.pool.num_used, cache.kv_bytes, 0, 0)  # what the next pass would begin with
    trace.close()
    (told,) = read(folder)
    return cache, told


@pytest.mark.parametrize("name", SETTINGS)
def test_a_trace_tells_what_the_cache_counts(name: str, tmp_path: Path, rng: torch.Generator) -> None:
    cache, told = run(tmp_path / "new" / "folder", rng, **SETTINGS[name])
    counted = rank_stats(cache)
    assert len(told.seals) == counted["seals"] > 20
    assert sum(told.stored.values()) - sum(told.freed.values()) == cache.pool.num_used == told.pages[-1]
    assert told.kv_bytes[-1] == cache.kv_bytes
    assert told.freed["evict"] == counted["evicted_pages"]
    assert told.freed["release"] > 0
    if name == "evicting":
        assert told.freed["evict"] > 0
    if name == "demoting":
        cut = told.stored[cache.formats[1].codec.label]  # prompts' pages come with the smaller codec at once
        assert 0 < told.freed["demote"] <= cut == counted["demoted_pages"]
    homeless = Counter(seal.home < 0 for seal in told.seals)
    assert homeless[True] == sum(seal.layer == 1 for seal in told.seals) > 0  # layer 1 has no router
    for seal in told.seals:
        counts = [count for _, count in seal.votes]
        assert counts == sorted(counts, reverse=True)
        assert seal.home == (seal.votes[0][0] if seal.votes else -1)
    assert sum(map(sum, homes([told]))) == homeless[False]


def test_reuse_distances_are_the_histogram_of_the_cache(tmp_path: Path, rng: torch.Generator) -> None:
    cache, told = run(tmp_path, rng, **SPARSE)
    reuse = cache.shard.reuse
    assert told.visits == int(reuse.counts[0]) > 100
    buckets = [0] * DISTANCES
    for distance, count in told.distances.items():
        buckets[distance.bit_length() - 1] += count
    assert buckets == reuse.histogram.tolist()
    assert sum(bucket > 0 for bucket in buckets) > 2


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"pikv\.trace = '.*file': .*name a folder that can be written"):
        make_cache(trace=f"{tmp_path}/file")
    with pytest.raises(ConfigError, match=r"pikv\.trace = 3: name a folder, or leave it out"):
        PiKVConfig.from_dict({"trace": 3})


def test_the_command(tmp_path: Path, rng: torch.Generator, capsys: pytest.CaptureFixture[str]) -> None:
    _, told = run(tmp_path, rng, **SPARSE)
    assert main(["trace", "show", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for word in ("1 ranks, 2 layers, 4 experts", f"{len(told.seals)}", "release", f"{told.visits:,}"):
        assert word in text
    assert main(["trace", "plot", str(tmp_path)]) == 0
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")
    other = tmp_path / "all"
    run(other, rng)
    assert main(["trace", "plot", str(other), "--out", f"{tmp_path}/all.png"]) == 0
    assert "reads every page in each pass" in capsys.readouterr().out


def test_a_trace_of_a_killed_rank_is_read(tmp_path: Path, rng: torch.Generator) -> None:
    _, whole = run(tmp_path, rng)
    path = tmp_path / "trace-rank0.jsonl"
    path.write_text(path.read_text()[:-20])
    (told,) = read(tmp_path)
    assert told.cut_off
    assert len(told.pages) == len(whole.pages) - 1


START = json.dumps({"event": "start", "version": 1, "rank": 0, "ranks": 1, "codecs": [{"codec": "none"}]}) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, 'no trace-rankN.jsonl in there; record one with "trace"'),
        ("", "empty; was the rank killed"),
        ("what\n", ":1: not a line of a trace: 'what"),
        ("{}\n", ":1: not the beginning of a trace of version 1"),
        (START + "{]\n", ":2: not a line of a trace"),
        ("5\n", ":1: not a line of a trace"),
        ("[" * 10**5 + "\n", ":1: not a line of a trace"),
        (START + "5\n", ":2: not a line of a trace"),
        (START + '{"event": "seal"}\n', ":2: not a line of a trace"),
        (START + '{"event": "store", "codec": 7, "slot": 0}\n', ":2: not a line of a trace"),
        ('{"event": "start", "version": 1}\n', ":1: not the beginning of a trace"),
    ],
)
def test_mistakes_are_one_line(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "trace-rank0.jsonl").write_text(text)
    assert main(["trace", "show", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
