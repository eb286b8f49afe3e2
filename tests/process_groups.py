"""Process groups that tests leave behind. Each keeps a thread that wakes a hundred times a second, and a run makes
thousands: together they took half of the machine."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

_made: list[Any] = []  # by `pikv_ds.core.exchange.make_group`, in this process


def watch() -> None:
    """Notes the groups that caches make from now on, which models that are never detached keep."""
    plain: Callable[..., Any] = dist.new_group

    def new_group(*args: Any, **kwargs: Any) -> Any:
        group = plain(*args, **kwargs)
        if sys._getframe(1).f_code.co_name == "make_group":
            _made.append(group)
        return group

    dist.new_group = new_group
    gc.freeze()  # what is there now stays, and need not be looked at again and again


def destroy_those_of_caches() -> None:
    """Destroys the groups that caches have made since the last time."""
    made = [group for group in _made if group in dist.distributed_c10d._world.pg_map]
    if not _made:
        return
    _made.clear()
    for group in made:
        dist.destroy_process_group(group)
    del made
    gc.collect()


def destroy_all_but_the_world() -> None:
    """Destroys the groups of this process that Megatron and others have made."""
    if not dist.is_initialized():
        return
    state = sys.modules.get("megatron.core.parallel_state")
    if state is not None and state.is_initialized():
        state.destroy_model_parallel()
    _made.clear()
    for group in [g for g in dist.distributed_c10d._world.pg_map if g is not dist.group.WORLD]:
        dist.destroy_process_group(group)
    gc.collect()
