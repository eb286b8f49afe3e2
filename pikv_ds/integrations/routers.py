"""Where a model's choice of experts can be read: at its routers, or at the experts that receive it.

Modules are known by what they take and return, not by the names of their classes, which differ from family to family.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pikv_ds.errors import UsageError


class UnknownRouterError(UsageError):
    """What a module takes or returns is no choice of experts."""


@dataclass(frozen=True, eq=False)
class ExpertChoice:
    """A module whose calls show which experts a layer's tokens have chosen."""

    module: nn.Module
    num_experts: int
    read: Callable[[Any], Tensor]
    """From the module's positional arguments or its output (see `of_arguments`) to the chosen experts, int
    ``[tokens, k]``, -1 for dropped."""
    of_arguments: bool = False

    def watch(self, tell: Callable[[Tensor], None]) -> RemovableHandle:
        """Calls `tell` with every choice, before the experts compute where it is an argument."""
        # Not compiled; said here and not at the functions, as it imports the compiler, and Triton with it.
        alone = torch.compiler.disable
        if self.of_arguments:
            return self.module.register_forward_pre_hook(functools.partial(alone(_before), self.read, tell))
        return self.module.register_forward_hook(functools.partial(alone(_after), self.read, tell))


def _before(
    read: Callable[[Any], Tensor], tell: Callable[[Tensor], None], module: nn.Module, args: tuple[Any, ...]
) -> None:
    tell(read(args))


def _after(
    read: Callable[[Any], Tensor], tell: Callable[[Tensor], None], module: nn.Module, args: Any, output: Any
) -> None:
    tell(read(output))


def find_choices(model: nn.Module) -> dict[nn.Module, ExpertChoice]:
    """The modules of transformers' MoE layers that show the choice.

    Nearly all families call ``experts(hidden, indices, weights)``; it is read there. The others are read at a gate
    that computes the choice itself and returns its logits.
    """
    found: dict[nn.Module, ExpertChoice] = {}
    for block in model.modules():
        experts = getattr(block, "experts", None)
        if isinstance(experts, nn.Module) and _num_arguments(experts) >= 3:
            count = count_experts(experts)
            if count is not None:
                found[experts] = ExpertChoice(experts, count, _second_argument, of_arguments=True)
            continue
        for gate in filter(_is_gate, block.children()):
            found[gate] = ExpertChoice(gate, int(gate.num_experts), _TopOfLogits(int(gate.top_k)))  # type: ignore[arg-type]
    return found


def has_experts(module: nn.Module) -> bool:
    """Whether a module has experts or is a set of them, to judge by what it is called."""
    named = isinstance(getattr(module, "experts", None), nn.Module) or "experts" in type(module).__name__.lower()
    return named and next(module.parameters(), None) is not None


def count_experts(experts: nn.Module) -> int | None:
    """How many experts a module holds; None: it does not tell."""
    for key in ("num_experts", "num_local_experts"):
        if isinstance(getattr(experts, key, None), int):
            return int(getattr(experts, key))
    if isinstance(experts, (nn.ModuleList, nn.ModuleDict)) and len(experts):
        return len(experts)
    stacked = {p.shape[0] for p in experts.parameters() if p.dim() >= 3}
    return stacked.pop() if len(stacked) == 1 else None


def same_number(choices: Iterable[ExpertChoice]) -> int | None:
    """How many experts the layers have; None without any.

    Raises:
        ValueError: layers with different numbers of experts.
    """
    counts = sorted({choice.num_experts for choice in choices})
    if len(counts) > 1:
        raise UsageError(f"MoE layers with different numbers of experts ({counts}) are not supported")
    return counts[0] if counts else None


def _num_arguments(module: nn.Module) -> int:
    """Positional arguments that a module's `forward` takes."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds for p in inspect.signature(module.forward).parameters.values())


def _second_argument(args: tuple[Any, ...]) -> Tensor:
    table = args[1] if len(args) > 1 else None
    if not isinstance(table, Tensor) or table.dim() != 2 or table.is_floating_point():
        what = tuple(table.shape) if isinstance(table, Tensor) else type(table).__name__
        raise UnknownRouterError(f"the experts were given {what} instead of a table of expert indices [tokens, k]")
    return table


def _is_gate(module: nn.Module) -> bool:
    """A gate that sorts tokens by expert for its layer: ``num_experts``, ``top_k`` and one projection to logits."""
    linear = [m for m in module.children() if isinstance(m, nn.Linear)]
    counts = [getattr(module, key, None) for key in ("num_experts", "top_k")]
    return (
        all(isinstance(n, int) for n in counts)
        and len(linear) == len(list(module.children())) == 1
        and linear[0].out_features == counts[0]
    )


@dataclass(frozen=True)
class _TopOfLogits:
    """Reads the choice from the logits ``[tokens, experts]`` at the end of a gate's output."""

    top_k: int

    def __call__(self, output: Any) -> Tensor:
        logits = output[-1] if isinstance(output, tuple) else None
        if not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.is_floating_point():
            raise UnknownRouterError("a gate's output does not end with logits [tokens, experts]")
        return logits.topk(self.top_k, dim=1).indices
