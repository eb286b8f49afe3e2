"""Environment variables, the launchers' above all: the only file that reads or writes them."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class World:
    """Where this process stands in its job."""

    rank: int
    size: int
    local_rank: int


def world() -> World:
    """The job as its launcher tells it; one rank without a launcher."""
    return World(
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")),
        int(os.environ.get("LOCAL_RANK", "0")),
    )


def launched() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def prepare() -> None:
    """Settings that DeepSpeed and torch read at import or start: call before `import deepspeed`.

    Without a GPU, DeepSpeed is told to use the CPU, and ranks that share a machine share its
    cores instead of each taking all of them (a factor of three on two ranks).
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world().size)
        if "OMP_NUM_THREADS" not in os.environ and local > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    if not launched():  # a plain `python script.py`: one rank that talks to itself
        os.environ.setdefault("RANK", "0")
        os.environ.setdefault("WORLD_SIZE", "1")
        os.environ.setdefault("LOCAL_RANK", "0")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """The environment of a process that is to be one of `size` ranks on this machine.

    Args:
        port: a free one, where the ranks meet.
    """
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {**os.environ, "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}


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
