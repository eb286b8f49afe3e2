"""benchmarks/gpu.sh goes through its steps on a CPU, and nothing that goes wrong in one of them ends the others."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import cases, extension, runner, summary, timings
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.results import Results
from benchmarks.gpu.runner import ALL_WELL, NOT_FINISHED, NOTHING_RAN, SOMETHING_FAILED, Step, Worker
from benchmarks.gpu.steps import STEPS
from pikv_ds.errors import UsageError
from pikv_ds.ops import Ops, why_missing
from pikv_ds.tools.bench.timing import Contender, measure

ROOT = Path(__file__).parents[1]
needs_cpp = pytest.mark.skipif(why_missing("cpp", "cpu") is not None, reason=str(why_missing("cpp", "cpu")))


def call(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    """The script's exit code, in this process."""
    monkeypatch.setattr(sys, "argv", ["gpu.sh", *args])
    before = signal.getsignal(signal.SIGTERM)
    try:
        return main()
    except SystemExit as stop:
        return stop.code
    finally:
        signal.signal(signal.SIGTERM, before)


def program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.mark.slow
def test_a_dry_run_makes_every_step_and_a_second_one_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools, out = tmp_path / "tools", tmp_path / "out"
    tools.mkdir()
    for name in ("ncu", "compute-sanitizer"):
        program(tools, name, 'echo "$@"')
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", sys.executable)
    command = [str(ROOT / "benchmarks/gpu.sh"), "--out", "out", "--dry-run"]
    first = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert first.returncode == ALL_WELL, first.stdout + first.stderr + (out / "log.txt").read_text()
    results = Results(out)
    states = {name: step["state"] for name, step in results.steps().items()}
    assert states == {step.name: "absent" if step.gpu else "done" for step in STEPS}
    for step in STEPS:
        assert step.gpu or step.always or results.cases(step.name), step.name
    assert all(case["ok"] for case in results.cases("float64").values())
    rows = [row for step in ("decode", "lookup", "seal") for c in results.cases(step).values() for row in c["rows"]]
    assert all(row["seconds"] > 0 for row in rows if row["contender"] != "of it the pages")  # a difference
    assert sum(case["counts"]["passed"] for case in results.cases("tests").values()) >= 1
    assert "-m benchmarks.gpu.timings int4 --device cpu --tokens 64" in (out / "ncu.txt").read_text()
    assert "racecheck" in (out / "sanitizer.txt").read_text()
    assert len(list(out.iterdir())) <= 8
    begun = results.records("begun")

    assert call(monkeypatch, "--out", str(out), "--dry-run") == ALL_WELL
    assert results.records("begun") == begun
    capsys.readouterr()
    assert call(monkeypatch, "--show", str(out)) == 0
    shown = capsys.readouterr().out
    assert shown == (out / "summary.md").read_text()
    assert "A dry run on a CPU: no figure here means anything" in shown
    for step in STEPS:
        assert f"| {step.name} | {states[step.name]} |" in shown


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out", "x", "--only", "decoding"], "--only: invalid choice: 'decoding' (choose from"),
        *(
            (["--out", "x", f"--minutes={minutes}"], "use a number of minutes above 0 and at most 1440")
            for minutes in ("0", "-1", "inf", "nan", "nine", "1441", "9" * 400)
        ),
        (["--show", "x"], "--show x: there is no results.jsonl in it"),
        (["--out", "x", "--show", "x"], "not allowed with"),
    ],
)
def test_wrong_arguments_are_named(args: list[str], message: str, monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks/gpu.sh: ")
    assert message in line
    assert len(line) < 1200
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_a_line(monkeypatch, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    assert call(monkeypatch, "--out", str(tmp_path / "file"), "--dry-run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "File exists" in line


@pytest.mark.parametrize("architectures", ["", "x", "9", "90", "9.0a;", "9.0;-1.0", "9.0+ptx", "9" * 400])
def test_wrong_architectures_are_a_line(architectures: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(extension, "build", lambda *_: pytest.fail("it builds"))
    monkeypatch.setattr(sys, "argv", ["extension", "--architectures", architectures])
    with pytest.raises(SystemExit) as stop:
        extension.main()
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "write architectures as 9.0a, or 8.0;10.0+PTX" in line


@pytest.mark.parametrize("architectures", ["9.0a", "8.0;9.0a;10.0+PTX", "8.6 12.0f"])
def test_a_build_that_fails_is_a_line(architectures: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def build(given: str) -> None:
        raise UsageError(f"no compiler for {given}")

    monkeypatch.setattr(extension, "build", build)
    monkeypatch.setattr(sys, "argv", ["extension", "--architectures", architectures])
    assert extension.main() == 2
    assert capsys.readouterr().err == f"error: no compiler for {architectures}\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    assert call(monkeypatch, "--out", str(tmp_path / "out")) == 2
    assert "sees no GPU here; on a CPU use --dry-run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- the runner --------------------------------------------------------------------------------


def run(folder: Path, *steps: Step, seconds: float = 60, sources: str = "a", dry_run: bool = True) -> int:
    return runner.run(folder, steps, seconds, dry_run, sources)


def states(folder: Path) -> dict[str, str]:
    return {name: step["state"] for name, step in Results(folder).steps().items()}


def fine(worker: Worker) -> None:
    worker.case("all", lambda: {"found": 1})


def cases_of(*work: Callable[[], dict], seconds: int = 60) -> Callable[[Worker], None]:
    def step(worker: Worker) -> None:
        for name, one in zip("abcdef", work, strict=False):
            worker.case(name, one, seconds)

    return step


def raising() -> dict:
    raise RuntimeError("no kernel image\nand more")


def test_a_step_that_hangs_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    def hang(worker: Worker) -> None:
        child = subprocess.Popen(["sleep", "300"])
        (worker.folder / "pid").write_text(str(child.pid))
        child.wait()

    began = time.monotonic()
    code = run(tmp_path, Step("hangs", "", hang, seconds=1), Step("fine", "", fine, seconds=30))
    assert code == SOMETHING_FAILED
    assert time.monotonic() - began < 20
    assert states(tmp_path) == {"hangs": "stopped", "fine": "done"}
    assert Results(tmp_path).steps()["hangs"]["reason"] == "it took longer than 1 s"
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_a_step_that_fails_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    def fail(worker: Worker) -> None:
        raise ValueError("no such shape")

    assert run(tmp_path, Step("fails", "", fail, 30), Step("fine", "", fine, 30)) == SOMETHING_FAILED
    assert states(tmp_path) == {"fails": "failed", "fine": "done"}
    assert Results(tmp_path).steps()["fails"]["reason"] == "ValueError: no such shape"
    assert "ValueError: no such shape" in summary.markdown(Results(tmp_path), ["fails", "fine"])


def test_a_step_that_dies_is_named_by_its_signal_or_exit_code(tmp_path: Path) -> None:
    """What it printed last says nothing of it."""

    def die(worker: Worker) -> None:
        print("all is well so far", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    run(tmp_path, Step("dies", "", die, 30), Step("leaves", "", lambda w: sys.exit(9), 30))
    reasons = [step["reason"] for step in Results(tmp_path).steps().values()]
    assert reasons == ["the process ended with SIGKILL", "the process ended with exit code 9"]


def test_a_case_that_raises_hangs_or_dies_costs_no_other_one(tmp_path: Path) -> None:
    def hang() -> dict:
        time.sleep(300)
        return {}

    def die() -> dict:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    work = cases_of(raising, hang, die, lambda: {"found": 2}, seconds=1)
    assert run(tmp_path, Step("cases", "", work, 30)) == SOMETHING_FAILED
    found = Results(tmp_path).cases("cases")
    assert found["a"]["error"] == "RuntimeError: no kernel image"
    assert found["b"]["error"] == "it took longer than a case may"
    assert found["c"]["error"] == "the process ended with SIGKILL"
    assert found["d"]["found"] == 2
    assert states(tmp_path) == {"cases": "done"}

    mended = cases_of(*[lambda: {"found": 3}] * 4)
    assert run(tmp_path, Step("cases", "", mended, 30)) == ALL_WELL  # what failed is tried again, and nothing else
    assert [case["found"] for case in Results(tmp_path).cases("cases").values()] == [3, 3, 3, 2]


def test_a_wrong_result_fails_the_call_and_is_kept(tmp_path: Path) -> None:
    step = Step("cases", "", cases_of(lambda: {"ok": False, "wrong": "off by 2"}), 30)
    assert [run(tmp_path, step), run(tmp_path, step)] == [SOMETHING_FAILED] * 2
    assert Results(tmp_path).failures("cases") == ["a: off by 2"]
    assert len(Results(tmp_path).records("case")) == 1


def test_what_time_leaves_over_is_for_the_next_call(tmp_path: Path) -> None:
    def slow() -> dict:
        time.sleep(0.6)
        return {"found": 1}

    step, last = Step("slow", "", cases_of(*[slow] * 6)), Step("never", "", fine, 0)
    assert run(tmp_path, step, seconds=2) == NOT_FINISHED
    assert states(tmp_path) == {"slow": "cut"}
    done = [case["case"] for case in Results(tmp_path).records("case")]
    assert 1 <= len(done) < 6
    assert run(tmp_path, step) == ALL_WELL
    assert [case["case"] for case in Results(tmp_path).records("case")] == list("abcdef")
    assert run(tmp_path, last, seconds=-1) == NOT_FINISHED


def test_what_gave_trouble_comes_after_the_rest_in_the_next_call(tmp_path: Path) -> None:
    def order(name: str) -> Callable[[Worker], None]:
        return lambda worker: worker.case(name, raising)

    steps = [
        Step("all the rest", "", order("z")),
        Step("x", "", lambda w: sys.exit(9), 30),
        Step("y", "", order("y"), 30),
    ]
    run(tmp_path, *steps)
    first = [step["step"] for step in Results(tmp_path).records("step")]
    assert first == ["x", "y", "all the rest"]
    run(tmp_path, *steps)
    assert [step["step"] for step in Results(tmp_path).records("step")][3:] == ["y", "x", "all the rest"]


@pytest.mark.parametrize(
    ("prepare", "limit", "state", "code"),
    [
        (lambda w: sys.exit(9), 30, "failed", SOMETHING_FAILED),
        (lambda w: w.case("all", raising), 30, "done", SOMETHING_FAILED),  # with a case that failed
        (lambda w: time.sleep(300), 1, "stopped", SOMETHING_FAILED),
        (lambda w: sys.exit(NOT_FINISHED), 30, "cut", NOT_FINISHED),
    ],
    ids=["fails", "case fails", "hangs", "is cut"],
)
def test_nothing_runs_where_what_it_needs_did_not(
    prepare: Callable[[Worker], None], limit: float, state: str, code: int, tmp_path: Path, capsys
) -> None:
    """A step after it would measure an extension of other sources."""
    rest = [Step("one", "", fine, 30), Step("two", "", fine)]
    for _ in range(2):  # that it gave trouble before does not put it after the rest
        assert run(tmp_path, *rest, Step("prepare", "", prepare, limit, always=True)) == code
        assert states(tmp_path) == {"prepare": state}
        assert "the run ends here: nothing may be measured without prepare" in capsys.readouterr().out
    assert run(tmp_path, *rest, Step("prepare", "", fine, 30, always=True)) == ALL_WELL
    assert [step["step"] for step in Results(tmp_path).records("step")] == ["prepare"] * 3 + ["one", "two"]


def test_a_prerequisite_that_cannot_run_has_failed(tmp_path: Path) -> None:
    prepare = Step("prepare", "", fine, 30, program="no-such-tool", always=True)
    assert run(tmp_path, prepare, Step("one", "", fine, 30)) == SOMETHING_FAILED
    assert states(tmp_path) == {"prepare": "failed"}


def test_without_time_for_what_it_needs_nothing_runs(tmp_path: Path) -> None:
    prepare = Step("prepare", "", fine, 30, always=True)
    assert run(tmp_path, prepare, Step("one", "", fine, 30), seconds=-1) == NOT_FINISHED
    assert states(tmp_path) == {}


def test_that_nothing_ran_is_not_all_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    tool, prepare = Step("tool", "", fine, 30, program="no-such-tool"), Step("prepare", "", fine, 30, always=True)
    assert run(tmp_path / "tool", tool) == NOTHING_RAN
    assert run(tmp_path / "prepared", prepare, tool) == NOTHING_RAN
    assert run(tmp_path / "only", prepare) == ALL_WELL
    assert run(tmp_path / "some", prepare, tool, Step("fine", "", fine, 30)) == ALL_WELL
    assert call(monkeypatch, "--out", str(tmp_path / "cli"), "--dry-run", "--only", "flex") == NOTHING_RAN
    assert "nothing ran: every step was left out (exit code 4)" in capsys.readouterr().out


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    steps = [Step("tool", "", fine, program="no-such-tool"), Step("peer", "", fine, module="no_such_module")]
    run(tmp_path, *steps)
    reasons = [step["reason"] for step in Results(tmp_path).steps().values()]
    assert reasons == ["no-such-tool is not on the path", "no_such_module is not installed"]


def test_results_of_other_code_are_not_mixed(tmp_path: Path) -> None:
    run(tmp_path, Step("fine", "", fine, 30))
    with pytest.raises(
        ValueError, match=r"has results with sources = 'a', but this call has 'b'; name another folder"
    ):
        run(tmp_path, Step("fine", "", fine, 30), sources="b")
    with pytest.raises(ValueError, match="dry_run = True"):
        run(tmp_path, Step("fine", "", fine, 30), dry_run=False)


def test_a_torn_line_costs_itself_only(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.append("case", step="s", case="a", call=1)
    with results.path.open("a") as file:
        file.write('{"kind": "case", "step": "s", "ca')
    results.append("case", step="s", case="b", call=1)
    assert list(results.cases("s")) == ["a", "b"]


def test_the_process_that_steps_are_forked_from_loads_no_extension() -> None:
    """It would be the one before `prepare`, and a GPU in use cannot be forked."""
    code = (
        "import sys, torch, benchmarks.gpu.__main__ as m; print('pikv_ds._C' in sys.modules, 'triton' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert said.stdout.split() == ["False", "False"]


# -- the checks against float64 ----------------------------------------------------------------


def test_there_are_forty_cases() -> None:
    assert len({case.name for case in cases.CASES}) == len(cases.CASES) == 40


@needs_cpp
@pytest.mark.parametrize("case", [cases.CASES[5], cases.CASES[23]], ids=lambda c: c.name)
@pytest.mark.parametrize("fault", ["tail", "merge", "pages", "seal"])
def test_a_wrong_op_is_found(case: cases.Case, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cases.check(case, "cpp", torch.device("cpu"))["ok"]

    class Faulty(Ops):
        def __init__(self, backend: str, *args: object) -> None:
            super().__init__(backend, *args)
            if backend == "reference":
                return
            if fault == "tail":  # one token too many
                tail = self.tail_attention
                self.tail_attention = lambda q, k, v, n, *rest: tail(q, k, v, (n + 1).clamp(max=k.shape[2]), *rest)
            elif fault == "merge":  # leaves the first partial out
                merge = self.merge_partials
                self.merge_partials = lambda outs, lses, *rest: merge(outs[1:], lses[1:], *rest)
            elif fault == "pages":  # a page too few
                attend = self.decode_attention
                self.decode_attention = lambda q, s, t, n, *rest: attend(q, s, t, (n - 1).clamp(min=0), *rest)
            else:
                seal = self.seal_pages
                self.seal_pages = lambda k, v, *rest: seal(k.roll(1, 0), v.roll(1, 0), *rest)

    monkeypatch.setattr(cases, "Ops", Faulty)
    found = cases.check(case, "cpp", torch.device("cpu"))
    assert not found["ok"]
    assert ("its pages are not the reference's" in found["wrong"]) == (fault == "seal")
    json.dumps(found, allow_nan=False)


@needs_cpp
def test_what_tools_look_at_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["timings", "int4", "none", "--device", "cpu", "--tokens", "320", "32", "0"]
    monkeypatch.setattr(sys, "argv", arguments)
    timings.main()


# -- the extension -----------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with a prebuilt extension that is taken to run."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/a.cu").write_text("int a;")
    (tmp_path / "setup.py").write_text("")
    prebuilt = tmp_path / "build/gpu"
    prebuilt.mkdir(parents=True)
    (tmp_path / "pikv_ds").mkdir()
    note(prebuilt, tmp_path, "prebuilt")
    monkeypatch.setattr(extension, "PROBE", "")
    monkeypatch.setattr(extension, "PREBUILT", prebuilt)
    monkeypatch.setattr(extension, "INSTALLED", tmp_path / "pikv_ds")
    return tmp_path


def note(folder: Path, tree: Path, binary: str) -> None:
    (folder / extension.BINARY).write_text(binary)
    facts = {"sources": extension.built_from(tree), "binary": extension.digest([folder / extension.BINARY], folder)}
    (folder / extension.NOTE).write_text(json.dumps(facts))


def test_a_carried_extension_is_used(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "build", lambda *_: pytest.fail("there is one"))
    assert extension.prepare("9.0a", tree) == {"used": "in build/gpu", "in pikv_ds": "there is none"}
    assert (tree / "pikv_ds" / extension.BINARY).read_text() == "prebuilt"
    assert extension.prepare("9.0a", tree)["used"] == "in pikv_ds"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: (t / "csrc/a.cu").write_text("int b;"), "built from other sources than csrc/"),
        (lambda t: (t / "csrc/b.h").write_text(""), "built from other sources than csrc/"),
        (lambda t: (t / "build/gpu" / extension.BINARY).write_text("x"), "not the file that _C.json was written for"),
        (lambda t: (t / "build/gpu" / extension.NOTE).unlink(), "no _C.json beside it"),
        (lambda t: (t / "build/gpu" / extension.NOTE).write_text('{"sour'), "_C.json beside it cannot be read"),
        (lambda t: (t / "build/gpu" / extension.NOTE).write_text("[]"), "_C.json beside it cannot be read"),
        (lambda t: (t / "build/gpu" / extension.NOTE).write_text("{}"), "_C.json beside it cannot be read"),
    ],
)
def test_a_stale_extension_is_not_used(tree: Path, change, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change(tree)
    assert reason in str(extension.fault(tree / "build/gpu", tree))
    monkeypatch.setattr(extension, "build", lambda *_: note(tree / "build/gpu", tree, "new"))
    told = extension.prepare("9.0a", tree)
    assert told["used"] == "built here"
    assert reason in told["in build/gpu"]
    assert (tree / "pikv_ds" / extension.BINARY).read_text() == "new"


def test_an_extension_that_does_not_run_here_is_not_used(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "PROBE", "raise RuntimeError('no kernel image')")
    assert extension.fault(tree / "build/gpu", tree) == "it does not run here: RuntimeError: no kernel image"
    monkeypatch.setattr(extension, "build", lambda *_: None)
    with pytest.raises(ValueError, match="the extension was built, but it does not run here"):
        extension.prepare("9.0a", tree)


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("import os, sys; print('a warning', file=sys.stderr, flush=True); os.abort()", "SIGABRT"),
        ("import os; os._exit(7)", "exit code 7"),
    ],
)
def test_an_extension_that_crashes_is_refused_by_the_signal(
    probe: str, reason: str, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        extension, "PROBE", f"import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); {probe}"
    )
    assert extension.fault(tree / "build/gpu", tree) == f"it does not run here: {reason}"


def test_why_builds_were_refused_is_said_before_another_one_fails(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extension, "PROBE", "raise RuntimeError('no kernel image')")
    said = "the extension in build/gpu: it does not run here: RuntimeError: no kernel image"

    def build(*_: object) -> None:
        assert said in capsys.readouterr().out.splitlines()  # already, should this be killed
        raise UsageError("no CUDA toolkit")

    monkeypatch.setattr(extension, "build", build)
    with pytest.raises(ValueError, match="the extension in pikv_ds: there is none; ") as error:
        extension.prepare("9.0a", tree)
    assert said in str(error.value)
    assert str(error.value).endswith("a new one: no CUDA toolkit")


def test_an_extension_in_use_is_replaced_and_not_overwritten(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tree / "pikv_ds" / extension.BINARY
    old.write_text("old")
    with old.open() as used:  # as a process that has mapped it
        assert extension.prepare("9.0a", tree)["used"] == "in build/gpu"
        assert used.read() == "old"
    assert old.read_text() == "prebuilt"
    assert sorted(p.name for p in old.parent.iterdir()) == [extension.BINARY, extension.NOTE]


def test_a_build_is_noted_with_its_sources(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", "/toolkit")
    (tree / "setup.py").write_text(
        "import os, pathlib, sys\n"
        "assert sys.argv[1:3] == ['-q', 'build_ext']\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--build-lib') + 1]) / 'pikv_ds'\n"
        "folder.mkdir(parents=True)\n"
        "names = 'CUDA_HOME', 'TORCH_CUDA_ARCH_LIST', 'PIKV_BUILD_CPP', 'PIKV_BUILD_CUDA'\n"
        "(folder / '_C.abi3.so').write_text(' '.join(os.environ[n] for n in names))\n"
    )
    extension.build("8.0", tree)
    assert (extension.PREBUILT / extension.BINARY).read_text() == "/toolkit 8.0 1 1"
    assert extension.fault(extension.PREBUILT, tree) is None
    assert sorted(p.name for p in extension.PREBUILT.iterdir()) == [extension.BINARY, extension.NOTE]
    (tree / "setup.py").write_text("raise SystemExit(7)")
    with pytest.raises(
        ValueError, match=r"the build for '8\.0' ended with exit code 7; see what the compiler printed"
    ):
        extension.build("8.0", tree)
    (tree / "setup.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(ValueError, match="ended with SIGKILL"):
        extension.build("8.0", tree)


def test_the_toolkit_is_found_behind_a_wrapper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", "/named")
    assert extension.cuda_home() == "/named"
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    program(tmp_path, "nvcc", f"echo '#$ _SPACE_= ' >&2; echo '#$ TOP={tmp_path}/cuda/bin/..' >&2")
    assert extension.cuda_home() == str(tmp_path / "cuda")
    program(tmp_path, "nvcc", "exit 1")
    with pytest.raises(ValueError, match="no line TOP="):
        extension.cuda_home()
    if shutil.which("nvcc", path="/bin:/usr/bin") is None:
        (tmp_path / "nvcc").unlink()
        with pytest.raises(ValueError, match="set CUDA_HOME"):
            extension.cuda_home()


# -- the clock of a GPU ------------------------------------------------------------------------


class Gpu:
    """What `Clock` asks of torch.cuda, with a log of it; a call of a contender takes a tenth of a millisecond."""

    def __init__(self, waits: bool) -> None:
        self.waits, self.log, self.now, self.mode = waits, [], 0.0, 0

    def contender(self, copies: int) -> Contender:
        def run(copy: int) -> None:
            if self.waits and self.mode == "error":
                raise RuntimeError("called a synchronizing CUDA operation")
            self.log.append(copy)
            self.now += 0.0 if self.capturing else 1e-4

        return Contender("work", run, copies, 1000)

    capturing = False

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) * 1e3

        class Graph:
            calls = 0

            def replay(self) -> None:
                gpu.now += self.calls * 5e-5  # the host's half is gone

        @contextlib.contextmanager
        def capture(graph: Graph) -> Iterator[None]:
            gpu.log.append("capture")
            gpu.capturing, before = True, len(gpu.log)
            yield
            gpu.capturing, graph.calls = False, len(gpu.log) - before

        stream = types.SimpleNamespace(wait_stream=lambda _: None)
        for name, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": capture,
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda _: contextlib.nullcontext(),
            "get_sync_debug_mode": lambda: gpu.mode,
            "set_sync_debug_mode": lambda mode: setattr(gpu, "mode", mode),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.parametrize(("copies", "calls"), [(3, 20), (50, 50)])
def test_a_gpu_is_timed_by_replays_of_a_graph(copies: int, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a call at least before the capture, and of two milliseconds, and of all copies of the data."""
    gpu = Gpu(waits=False)
    gpu.install(monkeypatch)
    (timing,) = measure([gpu.contender(copies)], [1], 5, torch.device("cuda"))
    assert timing.clock == "graph"
    assert timing.seconds == pytest.approx(5e-5)
    before, captured = gpu.log[: gpu.log.index("capture")], gpu.log[gpu.log.index("capture") + 1 :]
    assert set(before) == set(range(copies))  # warm, all of them
    assert len(captured) == calls
    assert set(captured) == set(range(copies))
    assert gpu.mode == 0


def test_what_waits_for_the_host_is_never_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(waits=True)
    gpu.install(monkeypatch)
    (timing,) = measure([gpu.contender(3)], [1], 5, torch.device("cuda"))
    assert (timing.clock, timing.seconds) == ("events", pytest.approx(1e-4))
    assert "capture" not in gpu.log
    assert gpu.mode == 0
