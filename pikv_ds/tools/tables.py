"""Prints tables for people: nothing of them is ever cut off, on a narrow terminal or in a pipe."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 1000
"""Of what is no terminal: each table gets as wide as it needs."""


def show(table: Table, console: Console | None = None) -> None:
    """Prints a table; where the terminal is too narrow for it, each of its rows as a list.

    Args:
        console: where to; None: standard output.
    """
    console = console or Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    measured = Table(show_header=table.show_header, box=table.box, show_edge=table.show_edge)
    measured.columns, measured.rows = table.columns, table.rows  # without the title, which may be wrapped
    if Measurement.get(console, console.options.update(width=PIPE_WIDTH), measured).maximum <= console.width:
        console.print(table)
        return
    for line in (table.title, table.caption):
        if line:
            console.print(line, highlight=False, soft_wrap=True)
    heads = [_text(column.header) for column in table.columns]
    width = max(map(len, heads))
    named = next((i for i, column in enumerate(table.columns) if column.justify == "left"), 0)
    for row in zip(*(list(column.cells) for column in table.columns), strict=True):
        cells = [_text(cell) for cell in row]
        console.print(Text(f"\n{cells[named]}", "bold"), soft_wrap=True)
        for i, (head, cell) in enumerate(zip(heads, cells, strict=True)):
            if i != named and cell:
                console.print(Text(f"  {head:<{width}}  {cell}"), soft_wrap=True)


def _text(cell: object) -> str:
    return Text.from_markup(cell).plain if isinstance(cell, str) else str(cell)
