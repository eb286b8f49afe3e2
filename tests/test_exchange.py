"""Errors of the backend, as they are told."""

from __future__ import annotations

import pytest
import torch

from pikv_ds.core.exchange import talking
from pikv_ds.errors import LostRankError


def test_a_backends_error_says_what_was_going_on() -> None:
    with (
        pytest.raises(LostRankError, match=r"while this one sent pages: Connection closed\. Look at"),
        talking("sent pages"),
    ):
        raise RuntimeError("Connection closed\nand a long trace")


def test_running_out_of_memory_is_not_blamed_on_another_rank() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"), talking("sent pages"):
        raise torch.OutOfMemoryError("out of memory")
