"""Checks of what comes from outside: settings, JSON, file names. Every error is one short line.

A check raises a `UsageError` with the key, the value and the remedy. The reader of the settings adds the path to the
key (``pikv.lookup.budget = 2: use …``). Values are shown in at most `SHOWN` characters, however long,
nested or strange they are.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from pikv_ds.errors import UsageError

MOST = 2**31 - 1
"""Of any whole number among the settings: tables of pages and tokens are int32."""
SHOWN = 160
"""Characters of a value in a message."""
LINE = 1000
"""Characters of a message."""
PATH = 4096
"""Bytes of a path (``PATH_MAX`` on Linux)."""


class _Shown(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = SHOWN
        self.maxlevel = self.maxdict = self.maxlist = self.maxtuple = self.maxset = 4

    def repr_int(self, x: int, level: int) -> str:
        digits = int(x.bit_length() * 0.30103) + 1  # Python refuses to write out thousands of them
        return repr(x) if digits <= 40 else f"a number of about {digits} digits"


def shown(value: Any) -> str:
    """A value as a message has it: `repr`, cut where it is long."""
    try:
        text = _Shown().repr(value)
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def named(key: Any) -> str:
    """A key as a message has it: as it is where it is a word, else as `shown` has it."""
    return key if isinstance(key, str) and key.isprintable() and 0 < len(key) <= 40 else shown(key)


def one_line(error: BaseException | str) -> str:
    """A message of anybody's in one line of at most `LINE` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LINE else f"{text[: LINE - 1]}…"


def refuse(key: Any, value: Any, remedy: str) -> NoReturn:
    """Raises the error of a key with a value that cannot work."""
    raise UsageError(f"{named(key)} = {shown(value)}: {remedy}")


def whole_problem(value: Any, least: int, most: int, because: str = "") -> str | None:
    """What to use instead of a value that is no whole number from `least` to `most`; None where it is one.

    Args:
        because: what the least is.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        return f"use a whole number of at least {least}" + (f" ({because})" if because else "")
    return f"use a whole number of at most {most}" if value > most else None


def is_real(value: Any, low: float, high: float, above: bool = False) -> bool:
    """Whether a value is a number from `low` to `high`; with `above`, `low` itself is none."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and low <= value <= high and not (above and value == low)


def whole_attributes(
    owner: Any,
    *keys: str,
    least: int = 1,
    most: int = MOST,
    because: str = "",
    optional: bool = False,
    without: str = "",
) -> None:
    """Attributes that must be whole numbers.

    Args:
        because: what the least is.
        optional: None will do.
        without: what None means, e.g. "no limit".
    """
    for key in keys:
        value = getattr(owner, key)
        if optional and value is None:
            continue
        if problem := whole_problem(value, least, most, because):
            refuse(key, value, problem + (f", or leave it out for {without}" if without else ""))


def real_attribute(owner: Any, key: str, low: float, high: float, remedy: str, above: bool = False) -> None:
    """An attribute that must be a number from `low` to `high`.

    Args:
        above: `low` itself is too low.
    """
    value = getattr(owner, key)
    if not is_real(value, low, high, above):
        refuse(key, value, remedy)


def flag(owner: Any, *keys: str) -> None:
    """Attributes that must be true or false."""
    for key in keys:
        if not isinstance(getattr(owner, key), bool):
            refuse(key, getattr(owner, key), "use true or false")


def choice(owner: Any, key: str, allowed: Iterable[Any], remedy: str, name: str = "") -> None:
    """An attribute that must be one of a few values, of their very type: 8.0 is not 8.

    Args:
        name: of the setting that it comes from, where that is another one.
    """
    value = getattr(owner, key)
    if not any(type(value) is type(one) and value == one for one in allowed):
        refuse(name or key, value, remedy)


def path(owner: Any, key: str, remedy: str, optional: bool = False) -> None:
    """An attribute that must be the path of a file or a folder, there or not."""
    value = getattr(owner, key)
    if optional and value is None:
        return
    if not isinstance(value, str) or not value or "\0" in value:
        refuse(key, value, remedy)
    try:
        fits = len(os.fsencode(value)) < PATH
    except UnicodeEncodeError:
        fits = False
    if not fits:
        refuse(key, value, f"is no path that a file can have; {remedy}")


def parse_json(text: str) -> Any:
    """Any JSON value.

    Raises:
        UsageError: where and why it cannot be read.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) < len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise UsageError(f"{named(twice)} is there twice; leave one out")
        return seen

    try:
        return json.loads(text, object_pairs_hook=unique)
    except UsageError:
        raise
    except json.JSONDecodeError as error:
        raise UsageError(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise UsageError("nested too deeply") from None
    except ValueError:  # Python's limit
        raise UsageError("has a number of thousands of digits") from None


def read_json(file: str | Path) -> Any:
    """Any JSON value from a file.

    Raises:
        UsageError: why it cannot be read; the caller names the file and the remedy.
    """
    try:
        return parse_json(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError("no such file") from None
    except OSError as error:
        raise UsageError(error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise UsageError("not a text in UTF-8") from None
