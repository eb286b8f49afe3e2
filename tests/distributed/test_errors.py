"""Two ranks and something wrong on one of them: every rank raises, soon, and says why."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cases
import pytest
import tiny
import torch
from cases import UNEVEN, Collector, Raised, Work, catching
from harness import Ranks, ranks_fixture
from torch import Tensor
from transformers import StoppingCriteriaList

import pikv_ds

pytestmark = pytest.mark.distributed
two = ranks_fixture(2)

SOON = 8.0
"""Seconds."""


def assert_raised(results: Sequence[Raised], kinds: Sequence[str], *words: str) -> None:
    """Every rank raised the named class, within seconds, with these words."""
    for rank, (raised, kind) in enumerate(zip(results, kinds, strict=True)):
        assert raised.kind == kind, f"rank {rank}: {raised}"
        assert raised.seconds < SOON, f"rank {rank}: {raised}"
        for word in words:
            assert word in raised.message, f"rank {rank}: {raised}"


def initialize_badly(rank: int, configs: Sequence[dict[str, Any]], model: dict[str, Any]) -> Raised:
    whole = tiny.mixtral(**model)
    with catching() as raised:
        pikv_ds.initialize(whole, configs[rank])
    return raised


BAD_SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], str, tuple[str, ...]]] = {
    "unknown-key": ({"pagesize": 8}, {}, "ConfigError", ("pikv.pagesize", "page_size")),
    "page_size-12": ({"page_size": 12}, {}, "ConfigError", ("pikv.page_size = 12", "16")),
    "codec": ({"codec": "int5"}, {}, "ConfigError", ("pikv.codec", "int4")),
    "3-experts": ({}, {"num_experts": 3}, "ConfigError", ("autoep_size = 2", "3 experts")),
    "sliding-window": (
        {},
        {"sliding_window": 32},
        "UnsupportedModelError",
        ("MixtralForCausalLM", "sliding_window = 32"),
    ),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_are_errors_on_every_rank(two: Ranks, case: str) -> None:
    pikv, model, kind, words = BAD_SETTINGS[case]
    configs = [cases.settings(pikv)] * 2
    assert_raised(two.run(initialize_badly, configs=configs, model=model), [kind] * 2, *words)


def test_ep_size_that_does_not_divide_the_ranks(two: Ranks) -> None:
    configs = [cases.settings({}, ep=3)] * 2
    results = two.run(initialize_badly, configs=configs, model={})
    assert_raised(results, ["ConfigError"] * 2, "autoep_size = 3", "2 rank(s)")


DIFFERENT = [("page_size", 8, 16), ("codec", "none", "int8"), ("partial_dtype", "float32", "bfloat16")]


@pytest.mark.parametrize(("key", "first", "second"), DIFFERENT, ids=[d[0] for d in DIFFERENT])
def test_ranks_with_different_settings(two: Ranks, key: str, first: Any, second: Any) -> None:
    configs = [cases.settings({key: value}) for value in (first, second)]
    results = two.run(initialize_badly, configs=configs, model={})
    assert_raised(results, ["PeerError"] * 2, key, str(first), str(second))


def generate_badly(
    rank: int,
    calls: Sequence[dict[str, Any]],
    works: Sequence[Work],
    pikv: Mapping[str, Any],
    nan_on: int | None,
    model: Mapping[str, Any],
    nan: float,
) -> dict[str, Any]:
    """A call that fails, then a good one on the same engine."""
    whole = tiny.mixtral(**model)
    reference = copy.deepcopy(whole)
    engine = pikv_ds.initialize(whole, cases.settings(pikv))
    if nan_on == rank:  # only now: DeepSpeed gives every rank the weights of the first
        engine.module.model.layers[1].self_attn.k_proj.weight[3, 5] = nan
    with catching() as raised:
        arguments = {"max_new_tokens": works[rank].new, "do_sample": False, **calls[rank]}
        engine.module.generate(works[rank].ids(rank), **arguments)
    if nan_on is not None:
        return {"raised": raised}
    after = cases.side_by_side(engine, reference, UNEVEN[rank], rank)
    store = cases.store_of(engine)
    store.begin_step(None, [])
    return {"raised": raised, "same": after["same"], "pages": store.pool.num_used}


def run_badly(two: Ranks, **arguments: Any) -> list[Raised]:
    defaults: dict[str, Any] = {
        "calls": [{}, {}],
        "works": UNEVEN,
        "pikv": {},
        "nan_on": None,
        "model": {},
        "nan": torch.nan,
    }
    results = two.run(generate_badly, **(defaults | arguments))
    for rank, result in enumerate(results):
        if "same" in result:
            assert result["same"], f"rank {rank}: the next generate differs from the unsharded model"
            assert result["pages"] == 0, f"rank {rank}: pages were lost"
    return [result["raised"] for result in results]


FULL = ["PoolFullError"] * 2


def test_pool_too_small_for_the_prompts(two: Ranks) -> None:
    works = (Work(2, 300, 10), Work(1, 400, 10))
    raised = run_badly(two, works=works, pikv={"capacity_tokens": 256})
    assert_raised(raised, FULL, "capacity_tokens", "256")


def test_pool_too_small_while_decoding(two: Ranks) -> None:
    works = (Work(4, 60, 200), Work(3, 60, 200))
    raised = run_badly(two, works=works, pikv={"capacity_tokens": 320})
    assert_raised(raised, FULL, "capacity_tokens", "320")


def test_pool_too_small_on_chunks(two: Ranks) -> None:
    works = (Work(2, 60, 10), Work(1, 700, 10))
    pikv = {"capacity_tokens": 320, "prefill_chunk_tokens": 64}
    assert_raised(run_badly(two, works=works, pikv=pikv), FULL, "capacity_tokens")


@pytest.mark.parametrize("new", [1, 10])
def test_nan_on_one_rank(two: Ranks, new: int) -> None:
    works = (Work(1, 40, new), Work(1, 40, new))
    raised = run_badly(two, works=works, nan_on=1)
    assert_raised(raised, ["NonFiniteError"] * 2, "rank 1", "layer 1")


@pytest.mark.parametrize("new", [1, 10])
def test_keys_beyond_the_codec_on_one_rank(two: Ranks, new: int) -> None:
    works = (Work(1, 40, new), Work(1, 40, new))
    raised = run_badly(two, works=works, nan_on=1, nan=1e12, pikv={"codec": "int4"})
    assert_raised(raised, ["OutOfRangeError"] * 2, "rank 1", "layer 1", "int4")


def test_prompt_longer_than_the_context_on_one_rank(two: Ranks) -> None:
    works = (Work(2, 40, 8), Work(1, 200, 8))
    raised = run_badly(two, works=works, model={"max_position_embeddings": 128})
    assert_raised(raised, ["PeerError", "UsageError"], "rank 1", "200", "128")


REFUSED_CALLS = {
    "num_beams": {"num_beams": 2},
    "use_cache": {"use_cache": False},
    "synced_gpus": {"synced_gpus": False},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("key", REFUSED_CALLS)
def test_refused_arguments_on_both_ranks_and_on_one(two: Ranks, key: str) -> None:
    bad = REFUSED_CALLS[key]
    assert_raised(run_badly(two, calls=[bad, bad]), ["UsageError"] * 2, key)
    assert_raised(run_badly(two, calls=[bad, {}]), ["UsageError", "PeerError"], key, "rank 0")


def test_arguments_that_cannot_even_be_checked(two: Ranks) -> None:
    raised = run_badly(two, calls=[{"max_new_tokens": "ten"}, {}])
    assert_raised(raised, ["UsageError", "PeerError"], "rank 0: ")


def break_down(rank: int, where: str, at: int) -> dict[str, Any]:
    """Code of the user's own raises on rank 0 at one of its tokens."""
    from transformers import LogitsProcessorList, StoppingCriteriaList

    engine, reference = cases.build("mixtral", {"timeout_s": 6})
    calls = 0

    def failing(ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if rank == 0 and calls == at:
            raise KeyError("the user's own mistake")
        return torch.zeros(len(ids), dtype=torch.bool) if where == "criterion" else scores

    extra: dict[str, Any] = {
        "criterion": {"stopping_criteria": StoppingCriteriaList([failing])},
        "processor": {"logits_processor": LogitsProcessorList([failing])},
    }[where]
    with catching() as raised:
        engine.module.generate(UNEVEN[rank].ids(rank), max_new_tokens=12, do_sample=False, **extra)
    after = cases.side_by_side(engine, reference, UNEVEN[rank], rank)
    return {"raised": raised, "same": after["same"]}


@pytest.mark.parametrize("at", [1, 3, 12])
@pytest.mark.parametrize("where", ["criterion", "processor"])
def test_an_exception_in_the_users_code_on_one_rank(two: Ranks, where: str, at: int) -> None:
    results = two.run(break_down, where=where, at=at)
    raised = [r["raised"] for r in results]
    assert_raised(raised, ["KeyError", "PeerError"], "the user's own mistake")
    assert raised[1].seconds < 4
    assert all(r["same"] for r in results)


def fail_before_a_pass(rank: int, victim: int, where: str, at: int) -> dict[str, Any]:
    """One rank raises outside of the forward passes, while the other one makes the next of them."""
    engine, reference = cases.build("mixtral", {"prefill_chunk_tokens": 16})
    work, extra, passes = (Work(1, 30, 20), Work(1, 57, 9))[rank], {}, 0

    def failing() -> None:
        raise KeyError("only here")

    def count(*args: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == at:
            failing()

    if rank == victim:
        hook = engine.module.register_forward_pre_hook(count)
        if where == "argument":
            extra = {"only_here": 1}
        elif where == "end":
            extra = {"streamer": Collector()}
            extra["streamer"].end = failing
    with catching() as raised:
        engine.module.generate(work.ids(rank), max_new_tokens=work.new, do_sample=False, **extra)
    if rank == victim:
        hook.remove()
    after = cases.side_by_side(engine, reference, UNEVEN[rank], rank)
    store = cases.store_of(engine)
    store.begin_step(None, [])
    return {"raised": raised, "same": after["same"], "pages": store.pool.num_used}


FAILURES = {
    "unknown-argument": ("argument", 0),
    "first-chunk": ("pass", 1),  # of rank 0 an idle pass: its prompt has fewer chunks
    "between-chunks": ("pass", 3),
    "decoding": ("pass", 7),
    "after-the-loop": ("end", 0),
}


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("case", FAILURES)
def test_an_error_before_a_pass_of_one_rank_reaches_the_other(two: Ranks, case: str, victim: int) -> None:
    where, at = FAILURES[case]
    results = two.run(fail_before_a_pass, victim=victim, where=where, at=at)
    raised, reason = [r["raised"] for r in results], "only_here" if where == "argument" else "only here"
    assert raised[victim].kind == ("ValueError" if where == "argument" else "KeyError")
    assert raised[1 - victim].kind == "PeerError"
    assert f"rank {victim}" in raised[1 - victim].message
    assert all(reason in r.message and r.seconds < SOON for r in raised), raised
    assert all(r["same"] and r["pages"] == 0 for r in results)


def be_silent(rank: int, folder: str) -> Raised:
    """Code of the user's own takes longer than the others wait."""
    engine = pikv_ds.initialize(tiny.mixtral(), cases.settings({"timeout_s": 2}))
    answered = Path(folder) / "answered"

    def wait() -> None:
        deadline = time.monotonic() + 20
        while not answered.exists() and time.monotonic() < deadline:
            time.sleep(0.05)

    streamer = Collector(at=42, action=wait) if rank == 0 else None
    with catching() as raised:
        engine.module.generate(Work(1, 40).ids(rank), max_new_tokens=5, do_sample=False, streamer=streamer)
    answered.touch()
    pikv_ds.detach(engine)  # works with a broken group, too
    return raised


def test_a_silent_rank_is_an_error_on_the_other_after_the_timeout(tmp_path: Path) -> None:
    ranks = Ranks(2, join=False)
    try:
        results = ranks.run(be_silent, folder=str(tmp_path))
    finally:
        ranks.close()
    assert results[1].kind == "LostRankError"
    assert "timeout_s" in results[1].message
    assert 2 <= results[1].seconds < 6


def generate_until_killed(rank: int, folder: str) -> Raised:
    engine = pikv_ds.initialize(tiny.mixtral(), cases.settings({"timeout_s": 5, "debug": False}))
    streamer = Collector(at=40 + 5, action=(Path(folder) / f"rank{rank}").touch)
    with catching() as raised:
        engine.module.generate(Work(1, 40).ids(rank), max_new_tokens=3000, do_sample=False, streamer=streamer)
    return raised


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_an_error_on_the_other(tmp_path: Path, victim: int) -> None:
    ranks = Ranks(2, join=False)
    try:
        ranks.post(generate_until_killed, folder=str(tmp_path))
        deadline = time.monotonic() + 40
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(list(tmp_path.iterdir())) == 2, ranks.output(0) + ranks.output(1)
        ranks.kill(victim)
        killed = time.monotonic()
        results = ranks.collect(20, may_die=(victim,))
        assert time.monotonic() - killed < 12
    finally:
        ranks.close()
    raised = results[1 - victim]
    assert raised.kind in ("LostRankError", "PeerError"), raised
    assert raised.message


def fail_within_a_pass(rank: int, where: str) -> Raised:
    engine = pikv_ds.initialize(tiny.mixtral(), cases.settings({"timeout_s": 4, "prefill_chunk_tokens": 16}))

    def failing(*args: Any) -> None:
        raise MemoryError("out of memory")

    if rank == 0 and where == "step-plan":  # once the ranks have agreed on the pass
        cases.store_of(engine).sender.send = failing
    elif rank == 0:
        engine.module.model.layers[1].register_forward_pre_hook(failing)
    with catching() as raised:
        work = Work(0 if rank == 0 and where == "idle-pass" else 1, 40)
        engine.module.generate(work.ids(rank), max_new_tokens=5, do_sample=False)
    return raised


@pytest.mark.parametrize("where", ["own-pass", "idle-pass", "step-plan"])
def test_an_exception_within_a_pass_on_one_rank_ends_the_others_after_the_timeout(where: str) -> None:
    ranks = Ranks(2, join=False)
    try:
        results = ranks.run(fail_within_a_pass, where=where)
    finally:
        ranks.close()
    assert results[0].kind == "MemoryError"
    assert results[0].seconds < 6
    assert results[1].kind in ("LostRankError", "PeerError")
    assert results[1].seconds < 12


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage = 3"),
        ({"zero_optimization": 3}, "zero_optimization = 3: use a JSON object"),
        ({"expert_parallel": True}, "expert_parallel = True: use a JSON object"),
        ({"expert_parallel": {"enabled": "yes"}}, "expert_parallel.enabled = 'yes'"),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}, "zero_optimization.stage = 3"),
    ],
)
def test_deepspeeds_settings_that_cannot_work(two: Ranks, extra: dict[str, Any], words: str) -> None:
    for raised, dtype in two.run(initialized_with, extra=extra):
        assert raised.kind == "ConfigError"
        assert words in raised.message
        assert dtype == "torch.float32"  # nothing has been done to the model


def initialized_with(rank: int, extra: dict[str, Any]) -> tuple[Raised, str]:
    model = tiny.mixtral()
    with catching() as raised:
        pikv_ds.initialize(model, {**cases.settings({}), **extra})
    return raised, str(model.dtype)


def interrupted(rank: int, kind: str) -> tuple[str, str, float]:
    """Ctrl-C, or a script that ends, between two passes of rank 1."""

    def stop(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if rank == 1 and ids.shape[1] >= 23:
            raise {"KeyboardInterrupt": KeyboardInterrupt, "SystemExit": SystemExit}[kind]("enough")
        return torch.zeros(len(ids), dtype=torch.bool)

    model = cases.attached("mixtral", {})
    started = time.monotonic()
    try:
        model.generate(tiny.prompt(1, 20, rank), max_new_tokens=9, stopping_criteria=StoppingCriteriaList([stop]))
    except BaseException as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return "", "", 0.0


@pytest.mark.parametrize("kind", ["KeyboardInterrupt", "SystemExit"])
def test_an_interrupt_of_one_rank_between_passes_reaches_the_other(two: Ranks, kind: str) -> None:
    (other, message, seconds), (own, *_) = two.run(interrupted, kind=kind)
    assert (own, other) == (kind, "PeerError")
    assert f"rank 1: {kind}" in message
    assert seconds < 10  # of a time-out of 20
