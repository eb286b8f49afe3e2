"""`--state` of the examples: a job goes on where it was stopped, and never from another job's tokens."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors.torch import load_file, save_file

from examples import generation
from examples.state import State, fingerprint, is_done, prepare, until_end
from pikv_ds import checks
from pikv_ds.errors import PeerError, UsageError
from pikv_ds.integrations.hf import checkpoints
from pikv_ds.integrations.hf.checkpoints import CheckpointError
from pikv_ds.launch_env import World

ROOT = Path(__file__).resolve().parents[1]
VOCAB = 128
ALONE = World(0, 1, 0)
PROMPTS = [[1, 2, 3], [4, 5]]
ANSWERS = [[7, 8, 9], [10]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    tokenizer = tiny.tokenizer()
    tiny.mixtral(vocab_size=len(tokenizer), max_position_embeddings=4096).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def job(model: Path, prompts: list[list[int]] = PROMPTS, engine: str = "deepspeed", **changes: Any) -> dict[str, Any]:
    options = {"dtype": "float32", "ignore_eos": False, "config": "ds.json"}
    others = changes.pop("deepspeed", {})
    settings = {k: v for k, v in changes.items() if k not in options}
    args = argparse.Namespace(**options | {k: v for k, v in changes.items() if k in options})
    return fingerprint(args, {"pikv": settings, **others}, str(model), prompts, engine)


def read(path: Path, job: dict[str, Any], world: World = ALONE, prompts: int = 2) -> list[list[int]]:
    return State(str(path), world, job).read(prompts, VOCAB)


def refusal(path: Path, job: dict[str, Any], world: World = ALONE, prompts: int = 2) -> str:
    with pytest.raises(ValueError, match="remove it to begin anew, or name another file") as error:
        read(path, job, world, prompts)
    text = str(error.value)
    assert text.startswith(f"--state: {path}.rank{world.rank} ")
    assert text.isprintable()
    return text


@pytest.fixture
def path(model: Path, tmp_path: Path) -> Path:
    """A file that the job of `job(model)` has left."""
    State(f"{tmp_path}/state", World(0, 1, 0), job(model)).write(ANSWERS)
    return tmp_path / "state"


def test_the_same_job_goes_on(path: Path, model: Path, tmp_path: Path) -> None:
    assert read(path, job(model)) == ANSWERS
    assert read(tmp_path / "another", job(model)) == [[], []]
    State(str(path), World(0, 1, 0), job(model)).remove()
    assert not list(tmp_path.iterdir())


def test_settings_without_effect_may_change(path: Path, model: Path) -> None:
    """More room, another folder for traces: the tokens are the same."""
    assert read(path, job(model, capacity_tokens=4096, trace="traces", timeout_s=9, slab_pages=2)) == ANSWERS


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": [[1, 2, 3], [4, 6]]}, "belongs to other prompts"),
        ({"prompts": [[1, 2, 3]]}, "belongs to other prompts"),
        ({"codec": "int8"}, "belongs to other settings (codec: 'none' there, 'int8' here)"),
        ({"dtype": "bfloat16"}, "belongs to other settings (dtype: 'float32' there, 'bfloat16' here)"),
        ({"deepspeed": {"bf16": {"enabled": True}}}, "belongs to other settings (deepspeed: {} there, "),
        ({"ignore_eos": True}, "belongs to other settings (ignore_eos: False there, True here)"),
        ({"engine": "megatron"}, "belongs to other settings (engine: 'deepspeed' there, 'megatron' here)"),
    ],
)
def test_another_job_is_refused(path: Path, model: Path, changes: dict[str, Any], words: str) -> None:
    assert words in refusal(path, job(model, **changes))


def test_calibration_files_count_by_content(path: Path, model: Path, tmp_path: Path) -> None:
    heads = tmp_path / "heads.json"
    heads.write_text('{"retrieval": [[true, false]]}')
    codec = {"name": "per_head", "heads": str(heads)}
    State(str(path), World(0, 1, 0), job(model, codec=codec)).write(ANSWERS)
    assert read(path, job(model, codec=codec)) == ANSWERS
    heads.write_text('{"retrieval": [[true, true]]}')
    assert "belongs to other settings (files: " in refusal(path, job(model, codec=codec))


def change_weights(folder: Path) -> None:
    """One number of one tensor: the size stays."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][-1] += 1
    save_file(tensors, path, {"format": "pt"})


def change_json(folder: Path, name: str, **settings: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    "change",
    [
        change_weights,
        lambda folder: change_json(folder, "config.json", rope_parameters={"rope_theta": 5.0, "rope_type": "default"}),
        lambda folder: change_json(folder, "generation_config.json", eos_token_id=5),
        lambda folder: (folder / "model.safetensors").rename(folder / "other.safetensors"),
    ],
)
def test_another_model_is_refused(path: Path, model: Path, change: Callable[[Path], Any], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    assert read(path, job(copy)) == ANSWERS  # where it lies does not matter
    change(copy)
    assert "belongs to another model" in refusal(path, job(copy))


def test_large_weights_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "SAMPLE", 16)
    monkeypatch.setattr(checkpoints, "SAMPLES", 4)
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(1000))
    plain = checkpoints.identity(tmp_path)
    for at in (0, 999):
        file.write_bytes(bytes(at) + b"x" + bytes(999 - at))
        assert checkpoints.identity(tmp_path) != plain, at
    file.write_bytes(bytes(1001))
    assert checkpoints.identity(tmp_path) != plain


def test_other_ranks_are_refused(path: Path, model: Path) -> None:
    State(str(path), World(1, 4, 1), job(model)).write(ANSWERS)
    (path.parent / "state.rank1").rename(path.parent / "state.rank0")
    assert "is of rank 1 of 4, not rank 0 of 1; go on with as many ranks" in refusal(path, job(model))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("5", "holds no tokens of a job"),
        ("[]", "holds no tokens of a job"),
        ("", "is damaged (line 1"),
        ("[" * 10**5, "is damaged (nested too deeply)"),
        (b"\xff\x00", "is damaged (not a text"),
        ('{"answers": [[1], [2]]}', "is of version 1 of this file, this program writes 3"),  # as it was before
        ('{"answers": 5, "version": 4}', "is of version 4 of this file"),
    ],
)
def test_other_files_are_refused(path: Path, model: Path, content: str | bytes, words: str) -> None:
    file = Path(f"{path}.rank0")
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in refusal(path, job(model))


def test_any_changed_or_missing_character_is_found(path: Path, model: Path) -> None:
    file = Path(f"{path}.rank0")
    whole = file.read_text()
    assert '"answers": [[7, 8, 9], [10]]' in whole
    file.write_text(whole.replace("[7, 8, 9]", "[7, 8, 3]"))
    assert "is damaged (its checksum differs)" in refusal(path, job(model))
    for end in range(0, len(whole) - 2, 97):
        file.write_text(whole[:end])
        assert "is damaged (line 1" in refusal(path, job(model))


@pytest.mark.parametrize("answers", [[[7]], 5, [[7], ["x"]], [[7], [True]], [[7], [VOCAB]], [[7], [-1]]])
def test_only_token_ids_of_the_model_are_taken(path: Path, model: Path, answers: Any) -> None:
    State(str(path), World(0, 1, 0), job(model)).write(answers)
    assert "has no lists of token ids for 2 prompts" in refusal(path, job(model))


def on_two_ranks(monkeypatch: pytest.MonkeyPatch, states: list[State]) -> list[Any]:
    """What `read` gives on each rank, or the message of its error."""
    results = together(monkeypatch, lambda rank: states[rank].read(1, VOCAB))
    assert all(isinstance(r, (list, UsageError, PeerError)) for r in results)
    return [str(r) if isinstance(r, Exception) else r for r in results]


def together(monkeypatch: pytest.MonkeyPatch, do: Callable[[int], Any]) -> list[Any]:
    """What each rank gives or raises, gathered as a job gathers."""
    barrier, told, results = threading.Barrier(2, timeout=30), [None, None], [None, None]

    def gather(own: Any, world: World) -> list[Any]:
        told[world.rank] = own
        barrier.wait()
        everyone = list(told)
        barrier.wait()
        return everyone

    monkeypatch.setattr(generation, "gather", gather)

    def work(rank: int) -> None:
        try:
            results[rank] = do(rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def two_states(path: Path, model: Path) -> list[State]:
    return [State(str(path), World(rank, 2, rank), job(model, [[rank + 1]])) for rank in range(2)]


def test_what_one_rank_refuses_all_refuse(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = two_states(tmp_path / "state", model)
    assert on_two_ranks(monkeypatch, states) == [[[]], [[]]]
    assert states[0].run == states[1].run  # agreed on
    for rank, state in enumerate(states):
        state.write([[rank + 7]])
    assert on_two_ranks(monkeypatch, again := two_states(tmp_path / "state", model)) == [[[7]], [[8]]]
    assert {state.run for state in again} == {states[0].run}  # a stopped run stays the same run
    (tmp_path / "state.rank1").write_text("5")
    first, second = on_two_ranks(monkeypatch, two_states(tmp_path / "state", model))
    assert first == f"rank 1: {second}"
    assert second.startswith(f"--state: {tmp_path}/state.rank1 holds no tokens of a job")


def test_a_file_that_cannot_be_read_is_refused_by_all(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state.rank1").mkdir()
    first, second = on_two_ranks(monkeypatch, two_states(tmp_path / "state", model))
    assert first == f"rank 1: {second}"
    assert second == f"--state: {tmp_path}/state.rank1 cannot be read (Is a directory); name another file"


@pytest.mark.parametrize("what", ["prompt", "tokenizer", "weights", "bug"])
def test_what_one_rank_cannot_prepare_all_refuse(
    what: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt, a tokenizer or weights that one node lacks, and a mistake of ours: the other rank does not wait."""
    (tmp_path / "prompt.txt").write_text("The whale")
    folder = tmp_path / "rank1"
    shutil.copytree(model, folder)
    if what == "tokenizer":
        (folder / "tokenizer.json").unlink()
    if what == "weights":
        identity = checkpoints.identity

        def read_all(path: str) -> str:
            return identity(path) if path == str(model) else Path("/").read_bytes().decode()  # an OSError

        monkeypatch.setattr(checkpoints, "identity", read_all)
    if what == "bug":
        monkeypatch.setattr(generation, "my_prompts", lambda args, *_: [][args.rank] if args.rank else ([], [], []))
    (tmp_path / "ds.json").write_text("{}")

    def work(rank: int) -> Any:
        prompt = f"{tmp_path}/gone.txt" if what == "prompt" and rank else f"{tmp_path}/prompt.txt"
        options = ["--config", f"{tmp_path}/ds.json", "--prompt-file", prompt, "--state", f"{tmp_path}/state"]
        args = generation.parse_arguments(options, None, "", "")
        args.rank = rank
        return prepare(args, {}, str(folder if rank else model), World(rank, 2, rank), 999, "deepspeed")

    first, second = together(monkeypatch, work)
    assert type(first) is PeerError
    assert str(first) == f"rank 1: {checks.one_line(second)}"
    wanted = {"prompt": UsageError, "tokenizer": CheckpointError, "weights": OSError, "bug": IndexError}
    assert isinstance(second, wanted[what])


def test_files_of_several_runs_are_not_mixed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for run in ("one", "two"):
        states = two_states(tmp_path / run, model)
        on_two_ranks(monkeypatch, states)
        for state in states:
            state.write([[7]])
    shutil.copy(tmp_path / "two.rank1", tmp_path / "one.rank1")
    first, second = on_two_ranks(monkeypatch, two_states(tmp_path / "one", model))
    assert first == second
    assert "the files of ranks 0 and 1" in first
    assert "are of different runs; remove all of them" in first


def test_a_rank_whose_file_is_gone_begins_anew(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = two_states(tmp_path / "state", model)
    on_two_ranks(monkeypatch, states)
    states[0].write([[7]])
    assert on_two_ranks(monkeypatch, two_states(tmp_path / "state", model)) == [[[7]], [[]]]


def test_answers_end_at_their_end_token() -> None:
    assert until_end([5, 2, 0, 0], [2], 9) == [5, 2]
    assert until_end([5, 6, 7], [2], 2) == [5, 6]
    assert until_end([5, 6, 7], [], 9) == [5, 6, 7]
    assert is_done([5, 2], [2], 9)
    assert is_done([5, 6], [2], 2)
    assert not is_done([5, 6], [2], 3)
    assert not is_done([], [2], 1)


STOPPING = """
import os, signal, sys
sys.path.insert(0, {root!r})
from examples import {engine}_generate as example

count, step = 0, example.Watch.{method}

def watch(self, value):
    global count
    count += 1
    if count == {after}:
        os.kill(os.getpid(), signal.SIGUSR1)
    return step(self, value)

example.Watch.{method} = watch
sys.exit(example.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_a_stopped_job_ends_with_an_undisturbed_ones_tokens(engine: str, model: Path, tmp_path: Path) -> None:
    """Two ranks, three prompts; one answer has ended when the job is stopped, the others go on."""
    if engine == "megatron":
        pytest.importorskip("megatron.core")
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    arguments = ["--model", str(folder), "--max-new-tokens", "24", "--state", f"{tmp_path}/state"]
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"Ship {i} sailed on day {i + 3}, and the whale swam {i} miles. " * 3)
        arguments += ["--prompt-file", f"{tmp_path}/{i}.txt"]

    def run(*more: str, stop: bool = False) -> tuple[subprocess.CompletedProcess[str], list[list[list[int]]]]:
        figures = tmp_path / "figures.json"
        figures.unlink(missing_ok=True)
        method, after = ("put", 9) if engine == "deepspeed" else ("step", 8)
        script = STOPPING.format(root=str(ROOT), engine=engine, method=method, after=after if stop else -1)
        command = [sys.executable, "-c", script, *arguments, *more, "--json", str(figures)]
        starter = f"import sys; from pikv_ds.tools import local_ranks as ranks; sys.exit(ranks.run({command!r}, 2))"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", starter], env=environment, capture_output=True, text=True, timeout=280, check=False
        )
        answers = [r["answer_ids"] for r in json.loads(figures.read_text())["generation"]] if figures.exists() else []
        return done, answers

    done, free = run("--ignore-eos")
    assert done.returncode == 0, done.stderr
    end = next(token for i, token in enumerate(free[0][1]) if 1 < i < 6 and token not in free[0][1][:i] + free[0][0])
    change_json(folder, "generation_config.json", eos_token_id=end)
    change_json(folder, "tokenizer_config.json", eos_token=tiny.tokenizer().convert_ids_to_tokens(end))
    done, undisturbed = run()
    assert done.returncode == 0, done.stderr
    assert len(undisturbed[0][1]) < 7 < len(undisturbed[0][0]) == 24
    done, stopped = run(stop=True)
    assert done.returncode == 0, done.stderr
    assert "rank 0: stopped" in done.stdout
    assert stopped[0][1] == undisturbed[0][1]  # without the padding that followed
    assert 0 < len(stopped[0][0]) < 24
    files = {rank: (tmp_path / f"state.rank{rank}") for rank in range(2)}
    assert [json.loads(files[rank].read_text())["answers"] for rank in range(2)] == stopped
    if engine == "deepspeed":  # another job is refused on both ranks
        done, nothing = run("--set", "codec=int8")
        assert (done.returncode, nothing) == (2, [])
        lines = [line for line in done.stderr.splitlines() if "belongs to other settings (codec: 'none' there" in line]
        assert {line.split(":")[0] for line in lines} == {"rank 0", "rank 1"}
        assert "Traceback" not in done.stderr
    done, resumed = run()
    assert done.returncode == 0, done.stderr
    assert resumed == undisturbed
    assert not list(tmp_path.glob("state.rank*"))
