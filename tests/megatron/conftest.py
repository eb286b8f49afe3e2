"""Ranks with Megatron: the harness of tests/distributed, whose server imports Megatron, too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distributed"))

import harness

harness.PRELOAD += ["megatron_patch.convert", "megatron_patch.models", "megatron.core.models.gpt"]  # if installed
