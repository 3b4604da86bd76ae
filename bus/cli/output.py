"""What is said: tables and lines for people, JSON lines for programs, talk on stderr.

Whatever is in an event was written by somebody else. Nothing of it reaches a terminal as a command:
control characters, those of eight bits among them, and those that turn the direction of writing are
shown as escapes. In JSON they are the escapes that JSON has.
"""

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import cache
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from bus.history.backlog import name_of
from bus.streams.keys import wire

# C0, DEL and C1; the marks, embeddings, overrides and isolates of bidirectional text; the
# separators of lines and paragraphs; what no text may hold alone.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_WIDE = 100_000  # columns where there is no terminal: nothing is cut or folded


@cache
def out() -> Console:
    """Return where results go: stdout."""
    return Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False, markup=False)


@cache
def err() -> Console:
    """Return where everything else goes: stderr."""
    width = None if sys.stderr.isatty() else _WIDE
    return Console(stderr=True, width=width, highlight=False, markup=False)


def say(text: str, style: str = "") -> None:
    """Say something that is no result."""
    err().print(Text(printable(text, lines=True), style=style), soft_wrap=True)


def printable(text: str, *, lines: bool = False) -> str:
    """Return text with escapes for what a terminal would obey; `lines`: line ends may stay."""
    return _UNSAFE.sub(lambda c: _shown(c[0], lines=lines), text)


def _shown(character: str, *, lines: bool) -> str:
    if lines and character in "\n\t":
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # noqa: PLR2004 - a byte of a name that is no text
        code -= 0xDC00
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}"  # noqa: PLR2004 - one byte


def json_text(value: Any, *, indent: int = -1) -> str:
    """Return a value as JSON, which is JSON still when a terminal shows it; by default one line."""
    try:
        encoded = msgspec.json.encode(value, enc_hook=str)
    except UnicodeEncodeError:  # of a name that is no text
        encoded = msgspec.json.encode(_texts(msgspec.to_builtins(value, enc_hook=str)))
    text = (encoded if indent < 0 else msgspec.json.format(encoded, indent=indent)).decode()
    return _UNSAFE.sub(lambda c: c[0] if c[0] == "\n" else f"\\u{ord(c[0]):04x}", text)


def _texts(value: Any) -> Any:
    r"""Return a value with bytes that are no text as people see them: `receipts\xff`."""
    if isinstance(value, str):
        return name_of(wire(value))
    if isinstance(value, dict):
        return {_texts(k): _texts(v) for k, v in value.items()}
    return [_texts(v) for v in value] if isinstance(value, list) else value


def json_line(value: Any, **more: Any) -> None:
    """Write a line of JSON. more: members of the object besides."""
    if more:
        value = {**more, **msgspec.to_builtins(value, enc_hook=str)}
    sys.stdout.write(json_text(value) + "\n")


def line(*parts: tuple[str, str]) -> None:
    """Write a line of (text, style), two spaces between them."""
    shown = [(printable(text), style) for text, style in parts if text]
    if out().is_terminal:
        out().print(Text("  ").join(Text(*part) for part in shown), soft_wrap=True)
        return
    sys.stdout.write("  ".join(text for text, _ in shown).rstrip() + "\n")


Column = tuple[str, Callable[[Any], object]]  # what it is called, and what it shows of a row


Limit = Annotated[int, Parameter(name=("--limit", "-n"), validator=Number(gte=0))]
Most = Annotated[
    int | None,
    Parameter(name=("--limit", "-n"), validator=Number(gte=1), help="So many at most."),
]


def table(rows: Iterable[Any], columns: Sequence[Column], *, empty: str = "") -> Table | Text:
    """Return rows as a table: numbers to the right, of a column that is empty nothing.

    empty: what is said instead where there is no row.
    """
    return _table([_cells(row, columns) for row in rows], columns, empty)


_Cells = list[tuple[str, bool]]


def _cells(row: Any, columns: Sequence[Column]) -> _Cells:
    return [_cell(show(row)) for _, show in columns]


def _table(found: list[_Cells], columns: Sequence[Column], empty: str) -> Table | Text:
    if not found:
        return Text(empty, style="dim")
    shown = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    used = [n for n in range(len(columns)) if any(cells[n][0] for cells in found)]
    for n in used:
        right = all(cells[n][1] or not cells[n][0] for cells in found)
        name = not any(" " in cells[n][0] for cells in found)  # and no prose: it stays in one line
        shown.add_column(columns[n][0], justify="right" if right else "left", no_wrap=name)
    for cells in found:
        shown.add_row(*(Text(cells[n][0]) for n in used))
    return shown


class Listing:
    """Rows, so many at most: as JSON a line each at once, for people a table in the end.

    limit: 0 for all. more: whether there were more of them. Nothing but the cells is kept.
    """

    def __init__(self, columns: Sequence[Column], limit: int, *, json: bool) -> None:
        self._columns = columns
        self._limit = limit
        self._json = json
        self._cells: list[_Cells] = []
        self._count = 0
        self.more = False

    def add(self, row: Any, document: Callable[[], Any]) -> bool:
        """Take a row, or say that there were enough. document: what it is as JSON."""
        self.more = bool(self._limit) and self._count >= self._limit
        if self.more:
            return False
        self._count += 1
        if self._json:
            json_line(document())
        else:
            self._cells.append(_cells(row, self._columns))
        return True

    def show(self, *, empty: str) -> None:
        """Show the table. empty: what is said where there is no row."""
        if not self._json:
            show(_table(self._cells, self._columns, empty))


def show(what: Table | Text | str) -> None:
    """Show a table or a text."""
    if isinstance(what, str):
        what = Text(printable(what, lines=True))
    if out().is_terminal:
        if isinstance(what, Text):
            out().print(what, soft_wrap=True)
        else:
            _wide_enough(what).print(what, soft_wrap=True)
        return
    with out().capture() as capture:
        out().print(what, soft_wrap=True)
    for text in capture.get().splitlines():
        sys.stdout.write(text.rstrip() + "\n")


def _wide_enough(what: Table) -> Console:
    """Return a terminal on which no id is cut in two: its lines go on where it is too narrow."""
    needed = Measurement.get(out(), out().options.update(width=_WIDE), what).minimum
    if needed <= out().width:
        return out()
    return Console(width=needed, highlight=False, markup=False)


def facts(pairs: Iterable[tuple[str, object]]) -> None:
    """Show names and values, a line each; what is empty is left out."""
    found = [(name, _cell(value)[0]) for name, value in pairs]
    width = max((len(name) for name, text in found if text), default=0)
    for name, text in found:
        if text:
            out().print(Text.assemble((name.ljust(width + 2), "bold"), text), soft_wrap=True)


def _cell(value: object) -> tuple[str, bool]:
    """Return a value as text, and whether it is a number."""
    if value is None or value is False:
        return "", False
    if value is True:
        return "yes", False
    if isinstance(value, int):
        return f"{value:,}", True
    if isinstance(value, float):
        return f"{value:,.1f}", True
    if isinstance(value, datetime):
        return moment(value), False
    text = printable(str(value))
    return text, text[:1].isdigit() or text in ("-", "0 s")


def many(count: int, one: str, several: str = "") -> str:
    """Return how many of what: `3 events`, `1 entry`."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def moment(time: datetime) -> str:
    """Return a UTC time as a person reads it, to the second."""
    return f"{time:%Y-%m-%d %H:%M:%S}Z"
