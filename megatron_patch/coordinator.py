"""Megatron's data-parallel coordinator, made safe to start, to stop and to lose.

The coordinator is a process that rank 0 starts; it hands requests to the ranks in turn. What is
added to it, and to the ranks' first contact, is what a server needs to end cleanly.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import threading
from typing import Any

from megatron.core.inference.data_parallel_inference_coordinator import DataParallelInferenceCoordinator

from megatron_patch import compat
from pikv_ds import launch_env

_HELLO, _READY, _GO = b"hello", b"ready", b"go"


class Coordinator(DataParallelInferenceCoordinator):  # type: ignore[misc]
    """Ends with rank 0, not by the signals of a terminal.

    Ctrl-C reaches every process of a job; were the coordinator to obey, running requests would
    lose their way back. It stops when all ranks have stopped. Megatron's own waits for messages for
    ever when rank 0 is killed.
    """

    @classmethod
    def entrypoint(cls, *args: Any, **kwargs: Any) -> None:
        quiet_signals()
        choose_addresses()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        parent = multiprocessing.parent_process()
        assert parent is not None
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
        super().entrypoint(*args, **kwargs)


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def quiet_signals() -> None:
    """Megatron's coordinator module makes every process print its stack when it is asked to end."""
    faulthandler.unregister(signal.SIGTERM)
    faulthandler.unregister(signal.SIGINT)


class _Loopback:
    """Stands in for Python's module `socket` where Megatron asks it for one thing only."""

    @staticmethod
    def gethostname() -> str:
        return "127.0.0.1"


def choose_addresses() -> None:
    """Has Megatron's sockets listen on loopback where all ranks are on this machine: they ask nobody who they are.

    Where ranks are on several machines, they listen as Megatron has it, on the address of the machine's name.
    """
    from megatron.core.inference import data_parallel_inference_coordinator
    from megatron.core.inference.engines import async_zmq_communicator, dynamic_engine

    for module in (data_parallel_inference_coordinator, async_zmq_communicator, dynamic_engine):
        module.socket = _Loopback if launch_env.one_machine() else socket


async def connect(engine: Any) -> str:
    """Starts the coordinator (on rank 0) and connects this rank's engine with it. Collective.

    Returns:
        The coordinator's address, for an `InferenceClient`.
    """
    from megatron.core.inference.engines import dynamic_engine

    compat.require(compat.ENGINE_SINCE, "the coordinator")
    dynamic_engine.DataParallelInferenceCoordinator = Coordinator
    choose_addresses()
    address = await engine.start_listening_to_data_parallel_coordinator(launch_inference_coordinator=True)
    _meet(getattr(engine, "expert_parallel_zmq_communicator", None))
    return str(address)


def _meet(communicator: Any) -> None:
    """Waits until all ranks of an expert-parallel group hear their leader.

    A ZeroMQ subscriber misses what is published before its subscription arrives; Megatron's ranks
    would wait for ever for a first word that they missed. So the leader says hello until all have
    answered, and then go, which all hear.
    """
    if communicator is None:
        return
    if communicator.is_leader:
        ready = 1
        while ready < communicator.world_size:
            communicator.bcast_sock.send(_HELLO)
            if communicator.gather_sock.poll(10):
                ready += communicator.gather_sock.recv() == _READY
        communicator.bcast_sock.send(_GO)
    else:
        communicator.bcast_sock.recv()
        communicator.gather_sock.send(_READY)
        while communicator.bcast_sock.recv() != _GO:
            pass
