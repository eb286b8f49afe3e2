"""Environment variables, the launchers' above all: the only file that reads or writes them.

Launchers tell a process its place in the job in different words. `normalise` turns all of them into torch's: ``RANK``,
``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT``.

=====================  =====================================================================================
launcher               what it sets
=====================  =====================================================================================
torchrun, deepspeed    torch's own names (`deepspeed` says ``LOCAL_SIZE``)
srun                   ``SLURM_PROCID``, ``SLURM_NTASKS``, ``SLURM_LOCALID``, ``SLURM_STEP_TASKS_PER_NODE``, …
mpirun (Open MPI)      ``OMPI_COMM_WORLD_RANK``, ``_SIZE``, ``_LOCAL_RANK``, ``_LOCAL_SIZE``
mpirun (MPICH, Intel)  ``PMI_RANK``, ``PMI_SIZE``, ``MPI_LOCALRANKID``, ``MPI_LOCALNRANKS``
=====================  =====================================================================================
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pikv_ds.errors import LaunchError

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class World:
    """Where this process stands in its job."""

    rank: int
    size: int
    local_rank: int


@dataclass(frozen=True)
class _Launcher:
    """A launcher's words for a process' place."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str
    command: str
    """A command that works."""


_TORCH = _Launcher(
    "torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "torchrun --nproc-per-node 2 script.py"
)
_OTHERS = (
    _Launcher(
        "mpirun (Open MPI)",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "mpirun -np 2 python script.py",
    ),
    _Launcher(
        "mpirun (MPICH or Intel MPI)",
        "PMI_RANK",
        "PMI_SIZE",
        "MPI_LOCALRANKID",
        "MPI_LOCALNRANKS",
        "mpirun -np 2 python script.py",
    ),
    _Launcher(
        "srun",
        "SLURM_PROCID",
        "SLURM_NTASKS",
        "SLURM_LOCALID",
        "SLURM_STEP_TASKS_PER_NODE",
        "srun --ntasks-per-node=2 python script.py",
    ),
)


def world() -> World:
    """The job as `normalise` has put it; one rank without a launcher."""
    return World(
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")),
        int(os.environ.get("LOCAL_RANK", "0")),
    )


def one_machine() -> bool:
    """Whether all ranks are on this machine, so that no other one needs to reach any; after `normalise`."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == world().size


def launched() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ or any(_started(launcher) for launcher in _OTHERS)


def _started(launcher: _Launcher) -> bool:
    """Whether this launcher did. What a batch script runs without `srun` has SLURM's variables, too, but no step's."""
    if launcher.name == "srun" and "SLURM_STEP_ID" not in os.environ:
        return False
    return launcher.rank in os.environ


def normalise() -> None:
    """Puts any launcher's variables into torch's, and checks them.

    Raises:
        LaunchError: variables that are missing or contradict each other, by name, with a command that works.
    """
    others = [launcher for launcher in _OTHERS if _started(launcher)]
    if "RANK" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1":
        _require(_TORCH)
        if "LOCAL_WORLD_SIZE" not in os.environ and "LOCAL_SIZE" in os.environ:  # deepspeed
            os.environ["LOCAL_WORLD_SIZE"] = os.environ["LOCAL_SIZE"]
        inner = any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "CROSS_RANK", _MARK))
        for launcher in others if not inner else ():  # torchrun and deepspeed may run under any of them
            size = _number(launcher.size)
            if size not in (1, _number("WORLD_SIZE")):
                raise LaunchError(
                    f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but {launcher.size}={size}: {launcher.name} started this "
                    f"process, and RANK and WORLD_SIZE were there before; run: unset RANK WORLD_SIZE LOCAL_RANK"
                )
        _check(_TORCH)
        return
    if not others:
        _refuse_batch_script()
        return
    launcher = others[0]
    _require(launcher)
    local_size = _local_size(launcher)
    os.environ.update(
        {
            _MARK: launcher.name,
            "RANK": str(_number(launcher.rank)),
            "WORLD_SIZE": str(_number(launcher.size)),
            "LOCAL_RANK": str(_number(launcher.local_rank)),
            "LOCAL_WORLD_SIZE": str(local_size),
        }
    )
    _check(launcher)
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        for name, value in zip(("MASTER_ADDR", "MASTER_PORT"), _meeting_place(launcher, local_size), strict=True):
            os.environ.setdefault(name, value)


_MARK = "PIKV_LAUNCHER"
"""Set where `normalise` made torch's variables, so that a second call finds no contradiction."""


def _require(launcher: _Launcher) -> None:
    """All that a launcher sets must be there."""
    names = [launcher.rank, launcher.size, launcher.local_rank]
    if launcher is _TORCH and os.environ.get("WORLD_SIZE") == "1":
        os.environ.setdefault("LOCAL_RANK", "0")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        there = ", ".join(f"{name}={os.environ[name]}" for name in names if os.environ.get(name))
        raise LaunchError(
            f"{', '.join(missing)} missing beside {there}: start all ranks with a launcher, e.g. {launcher.command}"
        )


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise LaunchError(f"{name}={text}: is no whole number of at least 0; let a launcher set it, e.g. torchrun")
    return int(text)


def _check(launcher: _Launcher) -> None:
    """Ranks must lie within their sizes."""
    for low, high in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if low in os.environ and high in os.environ and _number(low) >= _number(high):
            raise LaunchError(
                f"{low}={os.environ[low]}, but {high}={os.environ[high]}: ranks count from 0; start all of them with "
                f"one launcher, e.g. {launcher.command}"
            )


def _local_size(launcher: _Launcher) -> int:
    text = os.environ.get(launcher.local_size, "")
    if launcher.name != "srun":
        return int(text) if text.isdecimal() else _number(launcher.size)
    counts = tasks_per_node(text or os.environ.get("SLURM_TASKS_PER_NODE", "1"))
    node = int(os.environ.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else counts[-1]


def _meeting_place(launcher: _Launcher, local_size: int) -> tuple[str, str]:
    """Address and port where the ranks meet, the same on all of them."""
    if launcher.name == "srun":
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
        job = os.environ.get("SLURM_JOB_ID", "0")  # jobs that share a node must not meet on one port
        one_node = os.environ.get("SLURM_NNODES", os.environ.get("SLURM_JOB_NUM_NODES", "1")) == "1"
        address = "127.0.0.1" if one_node or not nodes else first_host(nodes)
        return address, str(20000 + (int(job) if job.isdecimal() else 0) % 10000)
    try:
        from mpi4py import MPI
    except ImportError as error:
        if local_size == _number(launcher.size):
            return "127.0.0.1", str(DEFAULT_PORT)
        raise LaunchError(
            f"MASTER_ADDR and MASTER_PORT are missing, and without mpi4py ({error}) ranks on several machines cannot "
            "find each other; pip install mpi4py, or pass them on: mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 …"
        ) from None
    place = None
    if MPI.COMM_WORLD.Get_rank() == 0:
        place = "127.0.0.1" if local_size == _number(launcher.size) else _own_address(), free_port()
    address, port = MPI.COMM_WORLD.bcast(place)
    return address, str(port)


def _own_address() -> str:
    """An address of this machine at which others find it."""
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(name)
        if not address.startswith("127."):
            return address
    return name


def _refuse_batch_script() -> None:
    """A batch script's own process has SLURM's variables, but is one process alone."""
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if os.environ.get("SLURM_PROCID") == "0" and "SLURM_STEP_ID" not in os.environ and tasks != "1":
        raise LaunchError(
            f"SLURM_NTASKS={tasks}, but SLURM_STEP_ID is missing: the batch script itself started this one process; "
            "put srun before the command (launch/slurm/srun.sbatch)"
        )


def tasks_per_node(text: str) -> list[int]:
    """SLURM's ``"2(x3),1"`` is ``[2, 2, 2, 1]``.

    Raises:
        LaunchError: it is nothing of the kind.
    """
    out: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE={text}: expected e.g. 2(x3),1; start the ranks with srun")
        out += [int(match[1])] * int(match[2] or 1)
    return out


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: ``"gpu[07-09,12],cpu3"`` is ``"gpu07"``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
    if match is None:
        raise LaunchError(f"SLURM_JOB_NODELIST={nodes}: has no host in it; set MASTER_ADDR")
    return match[1] + (match[2] or "") + match[3]


def prepare() -> None:
    """Settings that DeepSpeed and torch read at import or start: call before `import deepspeed`.

    Without a GPU, DeepSpeed is told to use the CPU, and ranks that share a machine share its
    cores instead of each taking all of them (a factor of three on two ranks).

    Raises:
        LaunchError: see `normalise`.
    """
    normalise()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or world().size)
        if "OMP_NUM_THREADS" not in os.environ and local > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    if not launched():  # a plain `python script.py`: one rank that talks to itself
        os.environ.setdefault("RANK", "0")
        os.environ.setdefault("WORLD_SIZE", "1")
        os.environ.setdefault("LOCAL_RANK", "0")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))


@dataclass
class StopRequest:
    """Whether somebody asked this process to come to an end: SIGTERM, or SIGUSR1 from SLURM before the time limit."""

    signals: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.signals)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Takes SIGUSR1 and SIGTERM as a request to finish what is under way and leave, while it is open.

    Launchers send SIGTERM to all ranks, and kill what is left some seconds later.
    """
    request = StopRequest()

    def note(number: int, frame: object) -> None:
        request.signals.append(signal.Signals(number).name)

    before = {number: signal.signal(number, note) for number in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """The environment of a process that is to be one of `size` ranks on this machine.

    Args:
        port: a free one, where the ranks meet.
    """
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    # Without these, gloo and NCCL listen on the first interface, for ranks on other machines, of which there are none.
    loopback = {variable: name for name in names for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    here = {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}
    return {**loopback, **os.environ, **here}


def store() -> Any:
    """The key-value store at which the ranks meet, as torch's ``env://`` has it.

    Torch's own listens on all interfaces. Where all ranks are on this machine and meet on loopback, this one listens
    there, unless torchrun's agent has made it.
    """
    place, address = world(), os.environ.get("MASTER_ADDR")
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if place.rank or agents or not one_machine() or address not in ("127.0.0.1", "localhost"):
        return next(dist.rendezvous("env://"))[0]
    listener = socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"])))
    return dist.TCPStore(
        "127.0.0.1", listener.getsockname()[1], place.size, is_master=True, master_listen_fd=listener.detach()
    )


def backend() -> str | None:
    """Backend of the ops that ``PIKV_BACKEND`` asks for; it goes before the configuration's."""
    return os.environ.get("PIKV_BACKEND") or None


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def return_freed_memory() -> None:
    """Gives memory of discarded weights back to the operating system.

    glibc keeps freed blocks of the size of a weight in its heap: after sharding the reference model
    a rank held 4.4 GiB, of which 2.6 GiB were free blocks.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def cache_dir() -> Path:
    """Where built models are kept: `$PIKV_CACHE`, else `$XDG_CACHE_HOME/pikv_ds`, else `~/.cache/pikv_ds`."""
    if os.environ.get("PIKV_CACHE"):
        return Path(os.environ["PIKV_CACHE"])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "pikv_ds"
    return Path.home() / ".cache" / "pikv_ds"


def device() -> torch.device:
    """This rank's device."""
    if torch.cuda.is_available():
        return torch.device("cuda", world().local_rank)
    return torch.device("cpu")
