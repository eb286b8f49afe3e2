"""`UtilityState`: what the scheduling ops remember of each slot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class UtilityState:
    """How useful each slot's page has been, ``N`` slots."""

    mass: Tensor
    """float32 ``[N]``: moving average of the page's attention mass, as of `last_step`."""
    last_step: Tensor
    """int32 ``[N]``: step of the last visit."""
    visits: Tensor
    """int32 ``[N]``"""

    @classmethod
    def empty(cls, num_slots: int, device: torch.device | str = "cpu") -> UtilityState:
        """A state that has seen nothing."""
        return cls(
            torch.zeros(num_slots, dtype=torch.float32, device=device),
            torch.zeros(num_slots, dtype=torch.int32, device=device),
            torch.zeros(num_slots, dtype=torch.int32, device=device),
        )

    def utilities(self, step: int, decay: float, weights: tuple[float, float, float]) -> Tensor:
        """How useful each page is, float32 ``[N]``; `choose_victims` ranks by it and says how it is made."""
        age = (step - self.last_step).float()
        return weights[0] * self.mass * decay**age + weights[1] / (1 + age) + weights[2] * torch.log1p(self.visits)
