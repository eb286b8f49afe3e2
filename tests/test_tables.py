"""Tables on narrow terminals and in pipes."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys

import pytest
from rich.console import Console
from rich.table import Table

from pikv_ds.tools import cli, tables
from pikv_ds.tools.plan import command

PIKV = [sys.executable, "-m", "pikv_ds.tools.cli"]
PLAN = [*PIKV, "plan", "--model", "mixtral-8x7b", "--gib", "20"]


def table() -> Table:
    out = Table(title="a title that is longer than the table, and may be wrapped", title_justify="left")
    for name, justify in (("ranks", "right"), ("way", "left"), ("longest context", "right")):
        out.add_column(name, justify=justify)  # type: ignore[arg-type]
    out.add_row("8", "[b]heads[/], replicated", "1,234,567")
    out.add_row("16", "another", "")
    return out


def shown(width: int) -> str:
    out = io.StringIO()
    tables.show(table(), Console(file=out, width=width))
    return out.getvalue()


def test_a_table_that_fits_is_a_table() -> None:
    text = shown(60)
    assert "│" in text
    assert "1,234,567" in text


@pytest.mark.parametrize("width", [10, 20, 40])
def test_one_that_does_not_is_a_list(width: int) -> None:
    lines = shown(width).splitlines()
    assert "│" not in "".join(lines)
    assert "…" not in "".join(lines)
    assert [line.split() for line in lines[1:] if line] == [
        ["heads,", "replicated"], ["ranks", "8"], ["longest", "context", "1,234,567"], ["another"], ["ranks", "16"],
    ]  # fmt: skip


def on_terminal(arguments: list[str], columns: int) -> str:
    """What a command writes to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "LINES": "50"}
    process = subprocess.Popen(arguments, stdout=theirs, stderr=theirs, env=environment, close_fds=True)
    os.close(theirs)
    out = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux' end of a terminal
            break
        if not piece:
            break
        out += piece
    os.close(ours)
    assert process.wait(60) == 0
    return out.decode()


def test_a_command_on_a_narrow_terminal_and_in_a_pipe() -> None:
    narrow = on_terminal(PLAN, 50)
    assert "…" not in narrow
    assert "PiKV int4" in narrow
    piped = subprocess.run(PLAN, capture_output=True, text=True, check=True).stdout
    assert "│ PiKV int4" in piped
    assert "\x1b" not in piped
    figure = next(line for line in piped.splitlines() if "PiKV int4" in line).split("│")[-2].strip()
    assert figure in narrow


def test_a_reader_that_goes_away_is_no_error_message() -> None:
    process = subprocess.Popen(PLAN, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) in (1, 141)


def test_an_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_plan", interrupted)
    assert cli.main(["plan", "--model", "mixtral-8x7b"]) == 130
    assert capsys.readouterr().err == "pikv plan: interrupted\n"
