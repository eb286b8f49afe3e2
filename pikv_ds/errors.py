"""Errors of a running cache (whatever one rank finds, every rank of the group raises), and of what it is given."""

from __future__ import annotations


class PiKVError(RuntimeError):
    """The cache cannot go on. Raised on every rank of the group at the same point."""


class PoolFullError(PiKVError):
    """No room for another page. The message says how much is missing and which setting to change."""


class NonFiniteError(PiKVError):
    """NaN or infinity in the keys or values of the model."""


class OutOfRangeError(PiKVError):
    """Keys or values that are finite, but beyond what the codec, or the summary of a lookup, can hold."""


class PeerError(PiKVError):
    """Another rank failed, or does something else than this one; the message has its reason."""


class LostRankError(PeerError):
    """Another rank died or fell silent: the group cannot be used any more."""


class UsageError(ValueError):
    """What somebody outside can set right: a setting, an argument, a file. The message says which, and how.

    Its own class, since a bare ValueError may as well be a mistake of ours (`zip` of unequal lengths, torch's).
    """


class LaunchError(UsageError):
    """A launcher's variables are missing or contradict each other. The message names them and a command that works."""
