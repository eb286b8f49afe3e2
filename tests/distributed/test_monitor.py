"""DeepSpeed's own monitor gets the cache's figures, where its configuration turns one on."""

from __future__ import annotations

import csv
from pathlib import Path

import cases
import pytest
import tiny
from harness import Ranks, ranks_fixture

import pikv_ds

pytestmark = pytest.mark.distributed
two = ranks_fixture(2)


def generate_with_monitor(rank: int, folder: str) -> int:
    monitor = {"csv_monitor": {"enabled": True, "output_path": folder, "job_name": "job"}}
    engine = pikv_ds.initialize(tiny.mixtral(), {**cases.settings({}), **monitor})
    engine.module.generate(tiny.prompt(1, 40, seed=rank), max_new_tokens=3, do_sample=False)
    seals = pikv_ds.api.attachment_of(engine).store.sender.counters["seals"]
    watchers = len(pikv_ds.api.attachment_of(engine).store.watchers)
    pikv_ds.detach(engine)
    assert watchers == 1
    return seals


def test_the_csv_monitor_has_the_caches_figures(two: Ranks, tmp_path: Path) -> None:
    seals = two.run(generate_with_monitor, folder=str(tmp_path))
    assert min(seals) > 0
    files = {path.stem: path for path in tmp_path.rglob("*.csv")}
    assert {"PiKV_kv_bytes", "PiKV_pages", "PiKV_seals"} <= set(files), sorted(files)
    rows = list(csv.reader(files["PiKV_kv_bytes"].open()))
    assert len(rows) >= 2  # a head, and a reading
    assert float(rows[1][1]) >= 0
