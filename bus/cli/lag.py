"""How far groups are behind: once, or again and again with the rates in between."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import NamedTuple

from rich.console import Group
from rich.live import Live
from rich.text import Text

from bus.cli.output import Column, json_line, moment, out, printable, say, show, table
from bus.cli.tables import Row, age, rate, state, undelivered
from bus.errors import ServerError


class Behind(NamedTuple):
    """A group at one moment, and what became of it since the one before.

    handled_per_s: how fast it got rid of entries; None at the first look. left_in_s: an estimate of
    when it has caught up; None if it does not.
    """

    row: Row
    handled_per_s: float | None
    left_in_s: float | None


COLUMNS: tuple[Column, ...] = (
    ("topic", lambda b: b.row.topic.name),
    ("group", lambda b: b.row.group.group),
    ("undelivered", lambda b: undelivered(b.row.group)),
    ("pending", lambda b: b.row.group.pending),
    ("inbox", lambda b: b.row.group.inbox),
    ("oldest", lambda b: age(b.row.group.oldest_age_s) or "-"),
    ("in a second", lambda b: rate(b.row.topic.appends_per_s)),
    ("done a second", lambda b: "" if b.handled_per_s is None else rate(b.handled_per_s)),
    ("caught up in", lambda b: age(b.left_in_s)),
    ("dead", lambda b: b.row.group.dead),
    ("workers", lambda b: b.row.group.workers),
    ("", lambda b: state(b.row.group)),
)
_EMPTY = "no group"


async def watch(
    look: Callable[[], Awaitable[list[Row]]], every_s: float | None, *, json: bool
) -> None:
    """Show what `look` finds, once, or every so many seconds until it is interrupted.

    Of a server that does not answer in between, what was is shown, and since when.
    """
    clock = asyncio.get_running_loop().time
    found, at = await look(), clock()
    behind = [Behind(row, None, None) for row in found]
    if every_s is None:
        _print(behind, json=json)
        return
    live = out().is_terminal and not json
    with Live(console=out(), auto_refresh=False) if live else nullcontext() as screen:
        answered, trouble = datetime.now(UTC), ""
        while True:
            if screen is not None:
                screen.update(_screen(behind, answered, trouble), refresh=True)
            elif not trouble:
                _print(behind, json=json)
            await asyncio.sleep(every_s)
            try:
                now = await look()
            except ServerError as error:
                if screen is None and not trouble:
                    say(f"warning: no answer since {moment(answered)}: {error}", "yellow")
                trouble = str(error)
                continue
            before, before_at, found, at = found, at, now, clock()
            behind = _since(before, found, at - before_at)
            answered, trouble = datetime.now(UTC), ""


def _since(before: list[Row], now: list[Row], passed_s: float) -> list[Behind]:
    """Return what is, with what became of what was: what came in, and is not there any more."""
    was = {(r.topic.name, r.group.group): r for r in before}
    found = []
    for row in now:
        old = was.get((row.topic.name, row.group.group))
        handled_per_s = left_in_s = None
        if old is not None and not (row.group.at_least or old.group.at_least):
            came_per_s = _came_per_s(old, row, passed_s)
            grew_per_s = (row.group.total - old.group.total) / passed_s
            handled_per_s = max(0.0, came_per_s - grew_per_s)
            if grew_per_s < 0 and row.group.total:
                left_in_s = row.group.total / -grew_per_s
        found.append(Behind(row, handled_per_s, left_in_s))
    return found


def _came_per_s(old: Row, now: Row, passed_s: float) -> float:
    """Return how fast a topic grew between two looks; by the average where nothing is counted."""
    added = [s.added for s in (*old.topic.streams, *now.topic.streams)]
    if None in added or len(old.topic.streams) != len(now.topic.streams):
        return now.topic.appends_per_s
    counts = [n or 0 for n in added]
    half = len(counts) // 2
    return max(0.0, (sum(counts[half:]) - sum(counts[:half])) / passed_s)


def _print(behind: list[Behind], *, json: bool) -> None:
    if not json:
        show(table(behind, COLUMNS, empty=_EMPTY))
        return
    time = datetime.now(UTC).isoformat()
    for each in behind:
        json_line(
            each.row.group,
            topic=each.row.topic.name,
            total=each.row.group.total,
            appends_per_s=each.row.topic.appends_per_s,
            handled_per_s=each.handled_per_s,
            left_in_s=each.left_in_s,
            time=time,
        )


def _screen(behind: list[Behind], answered: datetime, trouble: str) -> Group:
    """Return what fills the terminal: the worst first, since what does not fit is cut."""
    ordered = sorted(behind, key=lambda b: (-(b.row.group.oldest_age_s or 0), -b.row.group.total))
    head = Text(moment(answered), style="dim")
    if trouble:
        said = f"no answer since {moment(answered)}: {printable(trouble)}"
        head = Text(said, style="yellow")
    return Group(head, table(ordered, COLUMNS, empty=_EMPTY))
