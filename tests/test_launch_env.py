"""What launchers tell a process, and what becomes of it."""

from __future__ import annotations

import os
import signal

import psutil
import pytest

from pikv_ds import launch_env
from pikv_ds.errors import LaunchError


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment without a launcher's variables, for one test."""
    words = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "PMI_", "MPI_", "CROSS_", "TORCHELASTIC_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(words)}
    monkeypatch.setattr(os, "environ", kept)
    return kept


OMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
PMI = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "12345",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NNODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
PLACE = {"MASTER_ADDR": "node1", "MASTER_PORT": "1234"}


@pytest.mark.parametrize("launcher", [OMPI | PLACE, PMI | PLACE, SRUN], ids=["ompi", "pmi", "srun"])
def test_every_launcher_comes_to_torchs_words(launcher: dict[str, str], variables: dict[str, str]) -> None:
    variables.update(launcher)
    assert launch_env.launched()
    launch_env.prepare()
    assert launch_env.world() == launch_env.World(rank=3, size=4, local_rank=1)
    assert variables["LOCAL_WORLD_SIZE"] == "2"
    if launcher is SRUN:
        assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("gpu07", "22345")
    launch_env.prepare()  # a second time finds nothing wrong
    assert launch_env.world().rank == 3


def test_deepspeeds_own_word_for_ranks_on_a_machine(variables: dict[str, str]) -> None:
    variables.update(RANK="1", WORLD_SIZE="4", LOCAL_RANK="1", LOCAL_SIZE="2", CROSS_RANK="0", CROSS_SIZE="2")
    launch_env.prepare()
    assert variables["LOCAL_WORLD_SIZE"] == "2"


@pytest.mark.parametrize("inner", ["TORCHELASTIC_RUN_ID", "CROSS_RANK"])
def test_an_agent_under_another_launcher_is_believed(inner: str, variables: dict[str, str]) -> None:
    variables.update(SRUN | {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", inner: "0"})
    launch_env.prepare()
    assert launch_env.world().size == 8


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"RANK": "0"}, ("WORLD_SIZE, LOCAL_RANK missing beside RANK=0", "torchrun --nproc-per-node")),
        ({"WORLD_SIZE": "2"}, ("RANK, LOCAL_RANK missing beside WORLD_SIZE=2",)),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ("RANK=2, but WORLD_SIZE=2: ranks count from 0",)),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ("RANK=x: is no whole number",)),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"},
            ("LOCAL_RANK=2, but LOCAL_WORLD_SIZE=2",),
        ),
        (OMPI | {"RANK": "0", "WORLD_SIZE": "1"}, ("WORLD_SIZE=1, but OMPI_COMM_WORLD_SIZE=4", "unset RANK")),
        (
            SRUN | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
            ("WORLD_SIZE=2, but SLURM_NTASKS=4", "srun started this process"),
        ),
        (
            {k: v for k, v in OMPI.items() if "LOCAL_RANK" not in k},
            ("OMPI_COMM_WORLD_LOCAL_RANK missing", "mpirun -np"),
        ),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "two"}, ("SLURM_STEP_TASKS_PER_NODE=two", "2(x3),1")),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"},
            ("SLURM_STEP_ID is missing", "put srun before the command"),
        ),
    ],
)
def test_what_does_not_fit_together_is_named(
    given: dict[str, str], words: tuple[str, ...], variables: dict[str, str]
) -> None:
    variables.update(given)
    with pytest.raises(LaunchError) as error:
        launch_env.prepare()
    assert all(word in str(error.value) for word in words), str(error.value)


def test_ranks_of_several_machines_need_a_place_to_meet(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mpi4py", None)  # as if it were not installed
    variables.update(OMPI)
    with pytest.raises(LaunchError, match=r"MASTER_ADDR and MASTER_PORT are missing.*pip install mpi4py"):
        launch_env.prepare()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PIKV_LAUNCHER"):
        variables.pop(name)
    variables["OMPI_COMM_WORLD_LOCAL_SIZE"] = "4"  # all on this machine: there is only one place
    launch_env.prepare()
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("127.0.0.1", "29500")


@pytest.mark.parametrize(
    ("place", "one"),
    [
        ({}, True),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, True),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, False),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, False),  # nobody has said so
        (OMPI | PLACE, False),
        (SRUN, False),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0", "SLURM_NNODES": "1"}, True),
    ],
)
def test_whether_all_ranks_are_on_this_machine(place: dict[str, str], one: bool, variables: dict[str, str]) -> None:
    variables.update(place)
    launch_env.prepare()
    assert launch_env.one_machine() is one


def test_ranks_of_one_machine_talk_over_loopback_unless_told_otherwise(variables: dict[str, str]) -> None:
    variables.pop("GLOO_SOCKET_IFNAME", None)
    variables["NCCL_SOCKET_IFNAME"] = "eth7"
    environment = launch_env.rank_environment(0, 2, 1234)
    assert environment["GLOO_SOCKET_IFNAME"] in ("lo", "lo0")
    assert environment["NCCL_SOCKET_IFNAME"] == "eth7"
    assert environment["MASTER_ADDR"] == "127.0.0.1"


def test_the_store_of_one_machine_is_reached_from_there_only(variables: dict[str, str]) -> None:
    variables.update(launch_env.rank_environment(0, 1, launch_env.free_port()))
    store = launch_env.store()
    store.set("a", "b")
    assert store.get("a") == b"b"
    ours = [c for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert [c.laddr.ip for c in ours if c.laddr.port == store.port] == ["127.0.0.1"]


def test_a_batch_script_of_one_task_is_one_rank(variables: dict[str, str]) -> None:
    variables.update(SLURM_PROCID="0", SLURM_NTASKS="1", SLURM_JOB_ID="1")
    assert not launch_env.launched()
    launch_env.prepare()
    assert launch_env.world().size == 1


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[07-09,12],cpu3", "gpu07"),
        ("rack[3,5]n", "rack3n"),
        ("a-b[1-2]", "a-b1"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert launch_env.first_host(nodes) == first


@pytest.mark.parametrize(("text", "counts"), [("2", [2]), ("2(x3),1", [2, 2, 2, 1]), ("1,4(x2)", [1, 4, 4])])
def test_tasks_per_node(text: str, counts: list[int]) -> None:
    assert launch_env.tasks_per_node(text) == counts


def test_signals_are_noted_and_handlers_put_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with launch_env.stop_on_signals() as request:
        assert not request
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.signals == ["SIGUSR1"]
        assert request
    assert signal.getsignal(signal.SIGUSR1) is before


def test_lone_processes_do_not_meet_on_one_port(variables: dict[str, str]) -> None:
    ports = set()
    for _ in range(2):
        for name in ("MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
            variables.pop(name, None)
        launch_env.prepare()
        ports.add(variables["MASTER_PORT"])
    assert len(ports) == 2
    assert (variables["RANK"], variables["WORLD_SIZE"]) == ("0", "1")


def test_a_port_that_is_given_is_kept(variables: dict[str, str]) -> None:
    variables["MASTER_PORT"] = "12345"
    launch_env.prepare()
    assert variables["MASTER_PORT"] == "12345"


def test_a_launchers_settings_are_left_alone(variables: dict[str, str]) -> None:
    variables.update(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    launch_env.prepare()
    assert "MASTER_PORT" not in variables
