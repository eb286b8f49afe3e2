"""Step times: the cost model, its fit, its file, and what `pikv plan --measure` and `--simulate` do with it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_placement import choose_owner, order_of, page_limits

from pikv_ds import PiKVConfig
from pikv_ds.core.shape import ModelShape
from pikv_ds.core.trace import PageTrace, RankTrace, Seal, read
from pikv_ds.policies.placements import PLACEMENTS
from pikv_ds.policies.topology import Topology
from pikv_ds.tools.cli import main
from pikv_ds.tools.plan import costs, measure, planner, simulate
from pikv_ds.tools.plan.costs import Costs, Work
from pikv_ds.tools.plan.planner import DP

TRUE = Costs(3e-4, 1.3e-9, 2e-4, 1.3e-3, 5e-5, {"none": 1.2e-10, "int4": 2.2e-10})
ROUTING = Path(__file__).parents[1] / "benchmarks" / "results" / "routing-128"


def loads(generator: torch.Generator, count: int = 24) -> list[Work]:
    """Random ones, half of each codec."""

    def one(i: int) -> Work:
        draw = torch.rand(4, generator=generator).tolist()
        codec = ("none", "int4")[i % 2]
        pages = {codec: 1e6 + 1e8 * draw[0]}
        return Work(1 + int(8 * draw[1]), 1 + int(16 * draw[2]), 1e5 * draw[3], pages)

    return [one(i) for i in range(count)]


def test_the_fit_finds_the_costs_that_made_the_times(rng: torch.Generator) -> None:
    measured = [(work, TRUE.seconds(work)) for work in loads(rng)]
    found = costs.fit(TRUE.alpha, TRUE.beta, measured)
    for name in ("step", "layer", "row"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-6)
    assert found.byte == pytest.approx(TRUE.byte, rel=1e-6)


def test_the_fit_of_noisy_times_predicts_others(rng: torch.Generator) -> None:
    """Of 48 times and five costs: predictions are off by about a third of the noise, on average."""
    noise = 1 + 0.03 * torch.randn(48, generator=rng)
    measured = [(w, TRUE.seconds(w) * n) for w, n in zip(loads(rng, 48), noise.tolist(), strict=True)]
    found = costs.fit(TRUE.alpha, TRUE.beta, measured)
    errors = [abs(found.seconds(work) / TRUE.seconds(work) - 1) for work in loads(rng)]
    assert sum(errors) / len(errors) < 0.03
    assert min(found.step, found.layer, found.row, *found.byte.values()) >= 0


def test_a_cost_that_is_not_there_is_zero_and_never_negative(rng: torch.Generator) -> None:
    true = dataclasses.replace(TRUE, step=0.0, row=0.0)
    noise = 1 + 0.02 * torch.randn(24, generator=rng)
    found = costs.fit(0, 0, [(w, true.seconds(w) * n) for w, n in zip(loads(rng), noise.tolist(), strict=True)])
    assert min(found.step, found.layer, found.row, *found.byte.values()) >= 0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_nonnegative_least_squares_meets_the_optimality_conditions(seed: int) -> None:
    """Kuhn and Tucker's: no way down along what is free, none upwards along what is zero."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    target = torch.randn(12, generator=generator, dtype=torch.float64)
    x = costs.nonnegative(matrix, target)
    gradient = matrix.T @ (target - matrix @ x)
    assert (x >= 0).all()
    assert (gradient[x > 0].abs() < 1e-9).all()
    assert (gradient[x == 0] <= 1e-9).all()


def test_costs_are_kept_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "costs.json"
    assert costs.load(path) == {}
    costs.save(path, {"here": dataclasses.replace(TRUE, errors=[0.01, -0.02])})
    assert costs.load(path)["here"] == dataclasses.replace(TRUE, errors=[0.01, -0.02])
    path.write_text('{"here": {"alpha": 1}}')
    with pytest.raises(ValueError, match=r"costs\.json: not a file of costs .*remove it"):
        costs.load(path)
    with pytest.raises(ValueError, match="codec int2 was not measured, only none, int4"):
        TRUE.seconds(Work(1, 1, 0, {"int2": 1.0}))


SHAPE = ModelShape(4, 8, 2, 64, 8, torch.bfloat16)


def test_a_plan_s_work_is_what_measured_passes_do() -> None:
    """The planner's work for a load, and the work that the cache itself tells of such a load on one rank."""
    spec = measure.Spec(SHAPE, ["none"], 32, "float32", 1, [], [])
    exchange = measure.Exchange(None)
    case = measure.Case(4, 3, 1024)
    work, seconds = measure.timed_passes(exchange, spec, "int4", case)
    assert seconds > 0
    context = 1024 + 32 - measure.PASSES // 2 - measure.WARMUP + measure.PASSES + measure.WARMUP
    planned = planner.plan(SHAPE, PiKVConfig.from_dict({"codec": "int4"}), planner.Load(context, 3, 1)).work
    assert planned == work


def test_of_what_is_not_exchanged_or_not_known() -> None:
    load = planner.Load(4096, 8, 4)
    dp, tp, dcp = planner.baselines(SHAPE, PiKVConfig(), load)
    alone = planner.seconds(dp, TRUE)
    assert alone is not None
    assert alone == pytest.approx(TRUE.step + 4 * (TRUE.layer + 2 * TRUE.row + 2 * 4096 * 512 * TRUE.byte["none"]))
    assert planner.seconds(tp, TRUE) > alone  # each rank has half of the heads of all, twice
    assert planner.seconds(dcp, TRUE) > alone
    sparse = planner.plan(SHAPE, PiKVConfig.from_dict({"lookup": "quest"}), load)
    assert planner.seconds(sparse, TRUE) is None
    assert planner.seconds(dp, None) is None
    int8 = planner.plan(SHAPE, PiKVConfig.from_dict({"codec": "int8"}), load)
    assert planner.seconds(int8, TRUE) is None


CONFIG = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 64, "num_local_experts": 4}


LISTENING = """
import runpy, sys
import psutil
from pikv_ds import ExpertShardedKVCache
release = ExpertShardedKVCache.release
def look(*args, **kwargs):
    found = psutil.Process().net_connections("inet")
    print(*(c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN), file=open(sys.argv[3], "a"))
    release(*args, **kwargs)
ExpertShardedKVCache.release = look
runpy.run_module("pikv_ds.tools.plan.measure", run_name="__main__")
"""
"""A rank that writes down, after every load that it has measured, where it listens."""


def test_ranks_that_measure_listen_on_loopback_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [measure.Case(layers, 1, 64) for layers in (1, 2, 3, 4)]
    spec = measure.Spec(SHAPE, ["none"], 32, "float32", 1, cases, [])
    run = measure.ranks.run

    def run_looking(command: list[str], count: int) -> int:
        assert command[1:3] == ["-m", "pikv_ds.tools.plan.measure"]
        return run([command[0], "-c", LISTENING, *command[3:], str(tmp_path / "listening")], count)

    monkeypatch.setattr(measure.ranks, "run", run_looking)
    assert len(measure.local_ranks(spec, 2)["points"]) == 4
    looks = (tmp_path / "listening").read_text().splitlines()
    assert len(looks) >= 2 * 4
    assert all(looks), "a rank that listens nowhere: did it meet the others?"
    assert set(" ".join(looks).split()) == {"127.0.0.1"}


def test_measuring_two_ranks(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """Two real processes, of tiny loads; the plan has step times afterwards. How long anything took is not judged."""
    tiny = [measure.Case(1, 1, 64), measure.Case(2, 2, 64), measure.Case(1, 2, 128), measure.Case(2, 1, 128)]
    monkeypatch.setattr(measure, "FITTED", tiny)
    monkeypatch.setattr(measure, "HELD_OUT", [measure.Case(2, 1, 96)])
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    common = ["plan", "--model", str(tmp_path), "--costs", f"{tmp_path}/costs.json", "--codec", "none", "int8"]
    assert (
        main(
            [*common, "--measure", "2", "--rounds", "1", "--json", f"{tmp_path}/m.json", "--plot", f"{tmp_path}/m.png"]
        )
        == 0
    )
    text = capfd.readouterr().out
    for word in ("a collective (alpha)", "reading int8 pages", "predicted", "kept in"):
        assert word in text
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    (result,) = json.loads((tmp_path / "m.json").read_text())["results"].values()
    assert {p["codec"] for p in result["points"]} == {"none", "int8"}
    assert all(p["measured_s"] > 0 and p["predicted_s"] > 0 for p in result["points"])
    assert main([*common, "--context", "1k", "--batch", "4", "--ranks", "2", "--json", f"{tmp_path}/p.json"]) == 0
    assert "step: attention of a decode pass, by the costs of" in capfd.readouterr().out
    plans = {p["name"]: p["step_s"] for p in json.loads((tmp_path / "p.json").read_text())["plans"]}
    assert all(seconds > 0 for seconds in plans.values())
    assert main([*common, "--ranks", "4"]) == 0
    assert "no step times: pikv plan --model" in capfd.readouterr().out


def trace_of(folder: Path, experts: int, votes: list[list[list[int]]], page_size: int = 8) -> list[RankTrace]:
    """A trace of one layer with these votes, ``[sequence][page][expert]``."""
    facts = {"ranks": 1, "layers": 1, "experts": experts, "page_size": page_size, "codecs": []}
    trace = PageTrace(folder, 0, facts)
    for sequence, pages in enumerate(votes):
        numbers, counts = np.arange(len(pages)), np.array(pages).reshape(-1, experts)
        trace.seal(numbers * 0 + sequence, numbers * 0, numbers, numbers * 0, counts.argmax(1), {0: counts})
    trace.close()
    return read(folder)


@pytest.mark.parametrize("name", ["expert", "interleave"])
def test_pages_are_placed_as_the_cache_places_them(name: str, tmp_path: Path, rng: torch.Generator) -> None:
    experts, ranks, size = 8, 4, 8
    topology = Topology(experts, ranks)
    skewed = 1 + torch.rand(3, 20, experts, generator=rng) ** 6 * 40  # few experts have most votes
    votes = skewed.int().tolist()  # none has no vote: those are not recorded
    (routing,) = simulate.routings(trace_of(tmp_path, experts, votes), experts)
    drawn = routing.draw(6, 30, rng)
    lengths = [8 * 30, 8 * 7 + 3, 5, 8 * 22, 8 * 29, 8 * 30 + 7]
    expected = [0] * ranks
    flat = [v for sequence in votes for v in sequence]
    policy = PLACEMENTS[name]()
    for i, length in enumerate(lengths):
        loads = [0] * ranks
        for page in range(length // size):
            wanted = order_of(policy, page, flat[int(drawn[i, page])], topology)
            limits = page_limits((page + 1) * size, size, topology, i % ranks)
            owner = choose_owner(wanted, loads, limits, [10**9] * ranks)
            assert owner is not None
            loads[owner] += 1
        expected = [a + b for a, b in zip(expected, loads, strict=True)]
    assert simulate.place(routing, drawn, lengths, size, topology, name).tolist() == expected


def test_drawn_pages_are_runs_of_neighbours(rng: torch.Generator) -> None:
    routing = simulate.Routing(torch.zeros(50, 1), [(0, 30), (30, 20)])
    drawn = routing.draw(4, 200, rng)
    steps = (drawn[:, 1:] - drawn[:, :-1]) == 1
    assert steps.float().mean() > 0.8
    assert set(drawn.flatten().tolist()) <= set(range(50))


def test_two_levels_of_network() -> None:
    cluster = simulate.Cluster(8, simulate.Level(10, 1, 100), simulate.Level(20, 2, 10))
    assert cluster.all_to_all(1, 1e6) == 0
    assert cluster.all_to_all(8, 1e6) == pytest.approx(17e-6 + 7e6 / 100e9)
    assert cluster.all_to_all(16, 1e6) == pytest.approx(36e-6 + 8e6 / 10e9)
    assert (cluster.between_nodes(8), cluster.between_nodes(64)) == (0, 56)


def simulated(**changes: Any) -> dict[tuple[str, int], simulate.Point]:
    shape = ModelShape(4, 32, 4, 128, 128, torch.bfloat16)
    configs = {"PiKV int4": PiKVConfig.from_dict({"codec": "int4"})}
    fields = {"cluster": simulate.Cluster(), "context": 4096, "per_rank": 2, **changes}
    return {(p.way, p.ranks): p for p in simulate.Simulation(shape, configs, read(ROUTING), **fields).run(64)}


def test_a_simulation_of_the_recorded_routing() -> None:
    points = simulated()
    assert {ranks for _, ranks in points} == {8, 16, 32, 64}
    ours, dcp, dp = (points[way, 64] for way in ("PiKV int4, expert", "p mod c", DP))
    assert ours.skew > 1.2 * dcp.skew  # routing is skewed; the bound holds it
    assert ours.fullest < 0.5 * dcp.fullest < 0.9 * dp.fullest
    assert points["PiKV int4, eplb", 64].skew < ours.skew
    assert ours.between_bytes == dcp.between_bytes > 0
    node = points["PiKV int4, expert, KV shared per node", 64]
    assert node.between_bytes == 0
    assert node.step_s < ours.step_s
    assert simulated() == points
    equal = simulated(spread=0.0)
    assert equal[DP, 64].skew == 1
    slow = simulated(cluster=simulate.Cluster.of({"between": {"gb_per_s": 1}}))
    assert slow["PiKV int4, expert", 64].step_s > ours.step_s
    assert slow["PiKV int4, expert", 8] == points["PiKV int4, expert", 8]


def test_the_command_that_simulates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--model", "qwen3-30b-a3b", "--context", "2k", "--ranks", "16", "--simulate", str(ROUTING)]
    files = ["--json", f"{tmp_path}/s.json", "--plot", f"{tmp_path}/s.png", "--codec", "int4", "--per-rank", "1"]
    assert main([*arguments, *files, "--assume", '{"layer_us": 20}']) == 0
    text = capsys.readouterr().out
    for word in ("simulated: qwen3-30b-a3b", "PiKV int4, eplb", "assumed, not measured", '"layer_us": 20.0'):
        assert word in text
    facts = json.loads((tmp_path / "s.json").read_text())
    assert facts["simulated"] is True
    assert {p["ranks"] for p in facts["points"]} == {8, 16}
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--measure", "3"], "--measure 3: 8 experts cannot be spread"),
        (["--measure", "--simulate", "x"], "--measure and --simulate: one after the other"),
        (["--simulate", "nowhere"], "nowhere: no trace-rankN.jsonl in there"),
        (["--simulate", str(ROUTING)], "the trace is of a model with 128 experts, this one has 8"),
        (["--simulate", str(ROUTING), "--ranks", "4"], "--ranks 4: begin with a node, 8 ranks"),
        (["--simulate", str(ROUTING), "--lookup", "quest"], "knows exact lookups only"),
        (["--simulate", str(ROUTING), "--assume", "{"], "write a JSON object, or name a file"),
        (["--simulate", str(ROUTING), "--assume", '{"speed": 1}'], "--assume speed: unknown; choose one of"),
        (["--simulate", str(ROUTING), "--assume", '{"inside": {"gb_per_s": 0}}'], "--assume inside.gb_per_s = 0"),
        (["--simulate", str(ROUTING), "--assume", '{"layer_us": "x"}'], "--assume layer_us = 'x': use a number"),
        (["--pikv", "x=1"], "--pikv x=1: write a JSON object"),
        (["--pikv", "x={"], "--pikv x={: "),
        (["--pikv", '{"page_size": 16}', "--pikv", '{"page_size": 32}'], "one page_size for all"),
        (["--spread", "-1"], "--spread: -1: use a number"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "mixtral-8x7b", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_seals_of_a_layer_without_a_router_are_no_routing() -> None:
    trace = RankTrace({"experts": 4, "rank": 0}, seals=[Seal(0, 0, 0, 0, 0, -1, ())])
    with pytest.raises(ValueError, match="no page in the trace has a home expert"):
        simulate.routings([trace], 4)
