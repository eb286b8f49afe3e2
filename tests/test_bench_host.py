"""`pikv bench --op host`: every figure is there, and the mirror stands for a real group."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pikv_ds.tools.bench import host
from pikv_ds.tools.cli import main


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "FEW", 4)
    monkeypatch.setattr(host, "MANY", 12)
    monkeypatch.setattr(host, "LOADS", ((2, 70), (3, 200)))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "host.json"
    assert main(["bench", "--op", "host", "--rounds", "1", "--json", str(out)]) == 0
    figures = json.loads(out.read_text())["results"]
    names = {figure["name"] for figure in figures}
    assert {"a page, sealed and entered", "a call that seals", "ops per layer of a decode pass"} < names
    sealed = [(f["ranks"], f["experts"]) for f in figures if f["name"] == "a page, sealed and entered"]
    assert sealed == [(ranks, experts) for ranks in (1, 2, 4) for experts in (8, 128)]
    differences = ("a page, sealed and entered", "a call that seals")  # of times, which a busy machine may turn round
    assert all(figure["value"] > 0 for figure in figures if figure["name"] not in differences)
    assert "metadata per page, 3 rows × 200" in capsys.readouterr().out.replace("\n", " ")


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--op", "host", "--plot", str(tmp_path / "host.png")]) == 2
    assert "--plot: draws figures against context" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_mirrored_rank_holds_its_share_of_everybodys_pages(ranks: int) -> None:
    cache, batch = host._loaded(ranks, 3, 200)
    pages = sum(batch.sealed) * host.LAYERS
    assert cache.pool.num_used == int(cache.ledger.totals[0])
    assert int(cache.ledger.totals.sum()) == pages * ranks  # the others have as many
    for _ in range(host.PAGE + 1):
        host._decode_pass(cache, batch)
    cache.begin_step(None, [])
    assert int(cache.ledger.totals.sum()) == sum(batch.sealed) * host.LAYERS * ranks
