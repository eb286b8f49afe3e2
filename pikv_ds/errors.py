"""Errors of a running cache. Whatever one rank finds, every rank of the group raises."""

from __future__ import annotations


class PiKVError(RuntimeError):
    """The cache cannot go on. Raised on every rank of the group, with the same cause."""


class PoolFullError(PiKVError):
    """No room for another page. The message says how much is missing and which setting to change."""


class NonFiniteError(PiKVError):
    """NaN or infinity in the keys or values of the model."""


class PeerError(PiKVError):
    """Another rank failed, fell silent, or does something else than this one."""
