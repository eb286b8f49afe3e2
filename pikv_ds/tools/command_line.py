"""What the commands and the examples have in common: bad arguments and known errors are one line and exit code 2."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from pikv_ds import checks
from pikv_ds.checks import MOST, named, one_line
from pikv_ds.errors import PiKVError, UsageError

KNOWN = (UsageError, OSError, UnicodeError, PiKVError, MemoryError, torch.OutOfMemoryError)
"""What somebody at the command line can set right, texts and terminals of another encoding included. Anything else,
a bare ValueError too, is our fault and shows where it happened."""


THREADS, RANKS, GIB = 2**12, 2**16, 2**20
"""Most of each that an option takes."""

PICTURES = (".png", ".pdf", ".svg")


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, without the usage of forty options before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)}; see {self.prog} --help\n")


def guarded(name: str, work: Callable[[], int]) -> int:
    """Does the work of a command and returns its exit code; what is known to go wrong becomes a line.

    Args:
        name: what the line begins with.
    """
    try:
        if sys.stdout is None:  # closed by the shell: `pikv plan >&-`
            raise OSError("standard output is closed; send it to a file, or to /dev/null")
        status = work()
        sys.stdout.flush()  # a full disk shows here, not at Python's exit
        return status
    except BrokenPipeError:  # `pikv ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its exit
        return 141
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except (*KNOWN, RuntimeError) as error:
        if not isinstance(error, KNOWN) and "allocate memory" not in str(error):  # torch's, on a CPU
            raise
        print(f"{name}: {one_line(error)}", file=sys.stderr, flush=True)
        return 2


def whole(least: int = 1, most: int = MOST) -> Callable[[str], int]:
    """The type of an option: a whole number."""

    def parse(text: str) -> int:
        number = _digits(text.removeprefix("-"))
        if number is not None and text.startswith("-"):
            number = -number
        if problem := checks.whole_problem(number, least, most):
            raise argparse.ArgumentTypeError(f"{named(text)}: {problem}")
        assert number is not None
        return number

    return parse


def real(low: float, high: float, remedy: str, above: bool = False) -> Callable[[str], float]:
    """The type of an option: a number from `low` to `high`.

    Args:
        remedy: what to write, for the error.
        above: `low` itself is too low.
    """

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not checks.is_real(number, low, high, above):
            raise argparse.ArgumentTypeError(f"{named(text)}: {remedy}")
        return number

    return parse


def device(text: str) -> torch.device:
    """The type of an option: a device of torch's that is there."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:  # "Torch not compiled with CUDA enabled" is an assertion
        raise argparse.ArgumentTypeError(f"{named(text)}: {one_line(error)[:200]}; use cpu, cuda or cuda:1") from None


def tokens(text: str) -> int:
    """The type of an option: ``4096``, ``4k`` or ``1m``."""
    unit = {"k": 2**10, "m": 2**20}.get(text[-1:].lower(), 1)
    number = (_digits(text[:-1] if unit > 1 else text) or 0) * unit
    if checks.whole_problem(number, 1, MOST):
        raise argparse.ArgumentTypeError(
            f"{checks.shown(text)} is no number of tokens up to {MOST}; write 4096, 4k or 1m"
        )
    return number


def _digits(text: str) -> int | None:
    """The number that plain digits write, not too many of them; None for anything else."""
    return int(text) if text.isdecimal() and text.isascii() and len(text) <= 18 else None


def picture(text: str) -> Path:
    """The type of an option: a file that a picture is written to, of a kind that matplotlib can write."""
    if Path(text).suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"{named(text)}: use a name that ends in {', '.join(PICTURES)}")
    return Path(text)


def name_or_json(option: str, text: str) -> Any:
    """A policy as it is written on a command line: ``int4``, or ``{"name": "int4", "rotate": true}``.

    Raises:
        UsageError: naming the option.
    """
    try:
        return checks.parse_json(text) if text.lstrip().startswith("{") else text
    except UsageError as error:
        raise UsageError(f"--{option} {named(text)}: {error}; write a name or a JSON object") from None


def settings_of(option: str, text: str) -> tuple[str, dict[str, Any]]:
    """Settings as they are written on a command line, ``NAME={"codec": "int4"}`` or without the name.

    Raises:
        UsageError: naming the option.
    """
    name, body = ("", text) if text.lstrip().startswith("{") else text.partition("=")[::2]
    try:
        settings = checks.parse_json(body)
    except UsageError as error:
        raise UsageError(f"--{option} {named(text)}: {error}; write a JSON object") from None
    if not isinstance(settings, dict):
        raise UsageError(f"--{option} {named(text)}: write a JSON object, or NAME=JSON object")
    return name, settings


def check_folders(*files: Path | None) -> None:
    """Raises UsageError where a file that is to be written has no folder: before the work, not after it."""
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise UsageError(f"{file}: there is no folder {file.parent}")
