"""The example under every launcher, as a user starts it: the tokens are those of a single rank.

A small random model, one token per character; real processes, real launchers, and a real SLURM cluster of
two virtual nodes on this machine, where SLURM is installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import AutoTokenizer, MixtralForCausalLM

from pikv_ds import launch_env

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
SCRIPT = "examples/deepspeed_generate.py"
NEW_TOKENS = 12
LAUNCHERS = ("SLURM_", "OMPI_", "PMI", "MPI_", "WORLD_SIZE", "LOCAL_", "MASTER_", "CROSS_", "TORCHELASTIC")


def environment(**more: str) -> dict[str, str]:
    """This process' environment without what a launcher around the tests may have set."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS) and k != "RANK"}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **more}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of the example: a checkpoint and four prompts of different lengths."""
    tokenizer = tiny.tokenizer()
    folder = tmp_path_factory.mktemp("job")
    tiny.mixtral(vocab_size=len(tokenizer), max_position_embeddings=4096).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    arguments = [SCRIPT, "--model", f"{folder}/model", "--max-new-tokens", str(NEW_TOKENS), "--ignore-eos"]
    for i in range(4):
        prompt = folder / f"prompt{i}.txt"
        prompt.write_text(" ".join(f"Ship {i} sailed on day {n}." for n in range(8 + 9 * i)))
        arguments += ["--prompt-file", str(prompt)]
    return arguments


@pytest.fixture(scope="module")
def alone(job: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """What a single rank without a launcher generates."""
    out = tmp_path_factory.mktemp("alone") / "figures.json"
    run([sys.executable, *job, "--json", str(out)])
    return tokens(out)


def run(command: list[str], timeout: float = 120, **more: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def tokens(figures: Path, ranks: int | None = None) -> dict[str, list[int]]:
    """Generated tokens by prompt, of all ranks."""
    report = json.loads(figures.read_text())
    assert ranks in (None, report["num_ranks"])
    pairs = [zip(r["questions"], r["answer_ids"], strict=True) for r in report["generation"]]
    return {question: ids for of_rank in pairs for question, ids in of_rank}


def needs(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed; on Debian and Ubuntu: see .ci/run")


def test_a_single_rank_generates_all_prompts(alone: dict[str, list[int]]) -> None:
    assert sorted(alone) == [f"prompt{i}.txt" for i in range(4)]
    assert all(len(ids) == NEW_TOKENS for ids in alone.values())


def test_torchrun(job: list[str], alone: dict[str, list[int]], tmp_path: Path) -> None:
    port = str(launch_env.free_port())
    run(["launch/torchrun.sh", "2", *job, "--json", f"{tmp_path}/figures.json"], MASTER_PORT=port)
    assert tokens(tmp_path / "figures.json", ranks=2) == alone


def test_step_times_are_measured_with_a_launchers_ranks(job: list[str], tmp_path: Path) -> None:
    port = str(launch_env.free_port())
    measure = ["--measure", "--rounds", "1", "--codec", "none", "--costs", f"{tmp_path}/costs.json"]
    command = [
        "-m",
        "pikv_ds.tools.cli",
        "plan",
        "--model",
        job[job.index("--model") + 1],
        "--dtype",
        "float32",
        *measure,
    ]
    done = run(["launch/torchrun.sh", "2", *command], MASTER_PORT=port)
    assert done.stdout.count("loads that were not fitted") == 1, done.stdout  # one rank tells
    (key,) = json.loads((tmp_path / "costs.json").read_text())
    assert key == "cpu, 2 ranks, heads 4x2x16, float32, pages of 32"


def test_deepspeed(job: list[str], alone: dict[str, list[int]], tmp_path: Path) -> None:
    port = str(launch_env.free_port())
    run(["launch/deepspeed.sh", "2", *job, "--json", f"{tmp_path}/figures.json"], MASTER_PORT=port)
    assert tokens(tmp_path / "figures.json", ranks=2) == alone


@pytest.mark.sampled(few=1)
@pytest.mark.parametrize("meeting", ["mpi4py", "given"])
def test_mpirun(meeting: str, job: list[str], alone: dict[str, list[int]], tmp_path: Path) -> None:
    needs("mpirun")
    place = {}
    if meeting == "mpi4py":
        pytest.importorskip("mpi4py", reason="pip install mpi4py")
    else:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launch_env.free_port())}
    command = ["launch/mpirun.sh", "2", "--map-by", "node:OVERSUBSCRIBE", *job, "--json", f"{tmp_path}/figures.json"]
    run(command, **place)
    assert tokens(tmp_path / "figures.json", ranks=2) == alone


def test_two_deepspeed_agents_on_two_addresses(job: list[str], alone: dict[str, list[int]], tmp_path: Path) -> None:
    """Two nodes on one machine, each with an agent of its own, as a batch system starts them."""
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    port = str(launch_env.free_port())
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    agents = [
        subprocess.Popen(
            [launcher, "--no_ssh", "--node_rank", str(node), "--hostfile", f"{tmp_path}/hosts", "--master_addr",
             "127.0.0.1", "--master_port", port, *job, "--json", f"{tmp_path}/figures.json"],
            cwd=ROOT, env=environment(DS_ACCELERATOR="cpu", PYTHONPATH=str(ROOT)), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for node in range(2)
    ]  # fmt: skip
    outputs = [agent.communicate(timeout=120)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs[0][-2000:] + outputs[1][-2000:]
    assert tokens(tmp_path / "figures.json", ranks=2) == alone


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with an `ssh` that logs in to this machine without a password, to a daemon of its own."""
    needs("pdsh")
    needs("ssh-keygen")
    daemon = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
    if daemon is None or os.geteuid() != 0:
        pytest.skip("an ssh daemon (openssh-server) and root are needed; on Debian and Ubuntu: see .ci/run")
    folder, port = tmp_path_factory.mktemp("ssh"), launch_env.free_port()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where the daemon wants to be without privileges
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nListenAddress 127.0.0.2\nHostKey {folder}/host\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/user.pub\nStrictModes no\nUsePAM no\nPermitRootLogin yes\nMaxStartups 50\n"
    )
    (folder / "config").write_text(
        f"Host *\n  Port {port}\n  IdentityFile {folder}/user\n  StrictHostKeyChecking no\n"
        "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    (folder / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config "$@"\n')
    (folder / "ssh").chmod(0o755)
    process = subprocess.Popen([daemon, "-D", "-f", folder / "sshd_config", "-E", folder / "log"])
    yield folder
    process.terminate()
    process.wait()


def test_deepspeed_over_ssh(ssh: Path, job: list[str], alone: dict[str, list[int]], tmp_path: Path) -> None:
    """Two nodes on one machine, which the launcher logs in to."""
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    place = {"HOSTFILE": f"{tmp_path}/hosts", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launch_env.free_port())}
    path = f"{ssh}:{os.environ['PATH']}"
    run(["launch/deepspeed.sh", "1", *job, "--json", f"{tmp_path}/figures.json"], PATH=path, **place)
    assert tokens(tmp_path / "figures.json", ranks=2) == alone


# -- SLURM -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cluster of two virtual nodes; the folder of its configuration."""
    needs("slurmctld")
    needs("slurmd")
    needs("munged")
    if os.geteuid() != 0:
        pytest.skip("starting SLURM's daemons takes root")
    folder = tmp_path_factory.mktemp("slurm")
    for parent in (folder, *folder.parents[:3]):  # munge's user must reach its socket
        parent.chmod(0o755)
    subprocess.run([HERE / "cluster.sh", "up", folder, "2"], check=True, timeout=60)
    yield folder
    subprocess.run([HERE / "cluster.sh", "down", folder], check=False, timeout=60)


class Batch:
    """A submitted job."""

    def __init__(self, slurm: Path, folder: Path, script: str, options: list[str], arguments: list[str]) -> None:
        # Virtual nodes have names that nobody resolves.
        self.environment = environment(
            SLURM_CONF=f"{slurm}/slurm.conf",
            MASTER_ADDR="127.0.0.1",
            GLOO_SOCKET_IFNAME="lo",
            LOGS=str(folder / "logs"),
            RANKS_PER_NODE="1",
        )
        self.output = folder / "job.out"
        command = ["sbatch", "--parsable", f"--output={self.output}", "--open-mode=append", *options]
        self.id = self.call([*command, f"launch/slurm/{script}", *arguments]).strip()

    def call(self, command: list[str]) -> str:
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def field(self, name: str) -> str:
        facts = self.call(["scontrol", "show", "job", self.id, "--oneliner"])
        return next(word.split("=", 1)[1] for word in facts.split() if word.startswith(f"{name}="))

    def wait(self, states: tuple[str, ...] = ("COMPLETED",), seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while (state := self.field("JobState")) not in states:
            over = state in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "COMPLETED") or time.monotonic() > deadline
            assert not over, f"{state}\n" + self.written()
            time.sleep(0.3)

    def written(self) -> str:
        logs = sorted(self.output.parent.glob("logs/**/*.*"))
        return "".join(f"--- {p.name}\n{p.read_text()[-2000:]}" for p in [self.output, *logs] if p.is_file())


@pytest.mark.sampled(few=1)
@pytest.mark.parametrize(
    ("script", "options"),
    [("srun.sbatch", ["--ntasks-per-node=1"]), ("torchrun.sbatch", []), ("deepspeed.sbatch", [])],
)
def test_batch_scripts(
    slurm: Path, script: str, options: list[str], job: list[str], alone: dict[str, list[int]], tmp_path: Path
) -> None:
    batch = Batch(slurm, tmp_path, script, options, [*job, "--json", f"{tmp_path}/figures.json"])
    batch.wait()
    assert tokens(tmp_path / "figures.json", ranks=2) == alone, batch.written()


@pytest.mark.sampled(few=1)
@pytest.mark.parametrize("script", ["srun.sbatch", "torchrun.sbatch", "deepspeed.sbatch"])
def test_a_job_that_nears_its_time_limit_goes_on_later(
    slurm: Path, script: str, job: list[str], tmp_path: Path
) -> None:
    """SIGUSR1, as SLURM sends it before the limit: the ranks save their tokens and exit 0, the job is requeued, and
    its second run ends with the tokens of an undisturbed one."""
    many = [*job, "--max-new-tokens", "600"]
    undisturbed = tmp_path / "undisturbed.json"
    run([sys.executable, *many, "--json", str(undisturbed)])
    options = ["--ntasks-per-node=1"] if script == "srun.sbatch" else []
    arguments = [*many, "--state", f"{tmp_path}/state", "--json", f"{tmp_path}/figures.json"]
    batch = Batch(slurm, tmp_path, script, options, arguments)
    deadline = time.monotonic() + 60
    while "model loaded" not in batch.written() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1.5)  # some way into the tokens
    batch.call(["scancel", "--signal=USR1", batch.id])
    while batch.field("Restarts") != "1":
        assert time.monotonic() < deadline + 60, batch.written()
        time.sleep(0.3)
    saved = [json.loads((tmp_path / f"state.rank{r}").read_text())["answers"] for r in range(2)]
    assert all(0 < len(ids) < 1500 for answers in saved for ids in answers)
    # Requeued jobs wait for two minutes; the nodes remember for a second or so that they have ended this one.
    time.sleep(2.5)
    batch.call(["scontrol", "update", f"JobId={batch.id}", "StartTime=now"])
    batch.wait(seconds=150)
    report = json.loads((tmp_path / "figures.json").read_text())
    assert all(r["stopped_by"] is None for r in report["generation"])
    assert tokens(tmp_path / "figures.json", ranks=2) == tokens(undisturbed)
    assert not list(tmp_path.glob("state.rank*"))


def test_the_batch_script_of_megatrons_server(slurm: Path, job: list[str], tmp_path: Path) -> None:
    """It answers as the unsharded model in transformers does, and SIGTERM ends it well."""
    pytest.importorskip("megatron.core", reason="pip install 'pikv-ds[megatron]'")
    model, port = job[job.index("--model") + 1], launch_env.free_port()
    batch = Batch(slurm, tmp_path, "megatron_server.sbatch", [], ["--model", model, "--port", str(port)])

    def ask(path: str, body: dict[str, object] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or "{}")  # type: ignore[no-any-return]

    deadline = time.monotonic() + 120
    while True:
        try:
            ask("/v1/models")
            break
        except OSError:
            assert batch.field("JobState") in ("PENDING", "RUNNING"), batch.written()
            assert time.monotonic() < deadline, batch.written()
            time.sleep(0.5)
    prompt = " ".join(f"Ship {n} sailed on day {n}." for n in range(9))
    answer = ask("/v1/completions", {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0})
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    unsharded = MixtralForCausalLM.from_pretrained(model).generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert answer["choices"][0]["text"] == tokenizer.decode(unsharded[0, ids.shape[1] :])
    batch.call(["scancel", "--signal=TERM", batch.id])
    batch.wait(seconds=60)


def test_a_batch_script_without_srun_is_told_so(slurm: Path, job: list[str], tmp_path: Path) -> None:
    script = tmp_path / "plain.sbatch"
    script.write_text(f"#!/bin/bash\n{sys.executable} {' '.join(job)}\n")
    target = ROOT / "launch" / "slurm"
    batch = Batch(slurm, tmp_path, os.path.relpath(script, target), ["--nodes=2", "--ntasks-per-node=1"], [])
    batch.wait(("FAILED",))
    assert "put srun before the command" in batch.written()
    assert "Traceback" not in batch.written()
