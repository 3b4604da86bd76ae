"""`bus pending`: what groups were given and have not finished."""

from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from bus.admin.pending import PendingEntries, PendingEntry, PendingFilters
from bus.bus import Bus
from bus.cli.codes import DONE, FAILED
from bus.cli.consent import Consent
from bus.cli.entries import Types, document, pretty
from bus.cli.groups import Topic, tell_paused
from bus.cli.lengths import seconds
from bus.cli.names import Name
from bus.cli.options import Common
from bus.cli.output import Column, Limit, Listing, facts, json_line, many, moment, say
from bus.cli.tables import age
from bus.errors import DeclarationError

app = App(
    name="pending",
    help="What groups were given and have not finished: list, show, retry, give up.",
    help_format="plaintext",
)
MOST = 100  # rows that are listed unless somebody wants more


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Filters:
    """The options that choose pending entries."""

    topic: Topic = None
    state: Annotated[
        Literal["running", "parked", "orphaned", "half-done"] | None,
        Parameter(
            help="With a worker, waiting for a retry, of a worker that is gone, or with a part of"
            " its effects."
        ),
    ] = None
    type: Types = None
    consumer: Annotated[Name | None, Parameter(help="Of this worker or lane alone.")] = None
    min_idle: Annotated[str | None, Parameter(help="Untouched for so long: 5m, 2h.")] = None
    min_attempts: Annotated[int, Parameter(help="Given to workers so often at least.")] = 0

    def chosen(self, bus: Bus, group: str, ids: tuple[str, ...] = ()) -> PendingEntries:
        """Return what is meant."""
        filters: PendingFilters = {
            "types": self.type,
            "state": self.state,
            "owner": self.consumer,
            "min_attempts": self.min_attempts,
        }
        if self.min_idle is not None:
            filters["min_idle_s"] = seconds(self.min_idle, "--min-idle")
        if ids:
            filters["ids"] = ids
        return bus.admin.pending(group, self.topic, **filters)

    @property
    def any(self) -> bool:
        """Whether anything is chosen at all."""
        return any((self.state, self.type, self.consumer, self.min_idle, self.min_attempts))


_COMMON, _CONSENT, _FILTERS = Common(), Consent(), Filters()
COLUMNS: tuple[Column, ...] = (
    ("id", lambda e: e.id),
    ("type", lambda e: e.envelope.type if e.envelope else "deleted by hand"),
    ("key", lambda e: e.envelope.key if e.envelope else ""),
    ("", lambda e: e.state),
    ("attempts", lambda e: e.attempts),
    ("idle", lambda e: age(e.idle_s)),
    ("due", lambda e: moment(e.due_at) if e.due_at else ""),
    ("consumer", lambda e: "" if e.state == "parked" else e.owner),
)


@app.command(name="ls")
async def list_pending(
    group: Name,
    /,
    *,
    limit: Limit = MOST,
    filters: Filters = _FILTERS,
    common: Common = _COMMON,
) -> None:
    """List what is running, waits for a retry, or was left behind by a worker that is gone.

    Parameters
    ----------
    limit
        So many at most; 0 for all.
    """
    async with common.looking() as bus:
        listed = Listing(COLUMNS, limit, json=common.json)
        async with aclosing(aiter(filters.chosen(bus, group))) as entries:
            async for entry in entries:
                if not listed.add(entry, partial(_document, entry)):
                    break
    listed.show(empty="nothing is pending")
    if listed.more:
        say(f"and more: --limit 0 for all, or choose (bus pending ls {group} --help)")


@app.command(name="show")
async def show_one(
    group: Name, entry_id: str, /, *, topic: Topic = None, common: Common = _COMMON
) -> None:
    """Show one pending entry with its event.

    Parameters
    ----------
    entry_id
        As it is listed: order:0/1763629200000-0, or the part behind the / alone.
    """
    async with common.looking() as bus:
        entry = await bus.admin.pending(group, topic).get(entry_id)
    if common.json:
        json_line(_document(entry))
        return
    facts(
        [
            ("id", entry.id),
            ("group", entry.group),
            ("state", entry.state),
            ("consumer", entry.owner),
            ("due", entry.due_at),
            ("attempts", entry.attempts),
            ("idle", age(entry.idle_s)),
        ]
    )
    if entry.envelope is None:
        say("its entry was deleted by hand: a worker that meets it counts it as lost", "yellow")
    else:
        pretty(entry.envelope)


@app.command
async def retry(
    group: Name,
    /,
    *ids: str,
    everything: Annotated[bool, Parameter(name="--all", negative="")] = False,
    filters: Filters = _FILTERS,
    consent: Consent = _CONSENT,
    common: Common = _COMMON,
) -> int:
    """Retry at once what waits for its next attempt, or was left behind.

    What runs is left alone; what is half done, too, unless its id is said. The attempts that were
    used up stay used up.

    Parameters
    ----------
    ids
        These alone.
    everything
        All that waits.
    """
    _check_chosen(ids, filters, everything=everything)
    async with common.bus() as bus:
        chosen = await filters.chosen(bus, group, ids).fixed()
        done = await chosen.retry(dry_run=True)
        code = _tell_left(ids, done.matched, done.running, done.half_done)
        await tell_paused(bus, group, None if filters.topic is None else [filters.topic])
        what = f"retry {many(done.released, 'entry', 'entries')} of {group} now"
        if consent.given(what, nothing=not done.released):
            done = await chosen.retry()
            given = many(done.released, "entry", "entries")
            say(f"any worker may take {given} now{_also(done.gone, done.lost)}")
    if common.json:
        json_line(done, dry_run=consent.dry_run)
    return code


@app.command(name="dead-letter")
async def dead_letter(
    group: Name,
    /,
    *ids: str,
    why: str,
    everything: Annotated[bool, Parameter(name="--all", negative="")] = False,
    filters: Filters = _FILTERS,
    consent: Consent = _CONSENT,
    common: Common = _COMMON,
) -> int:
    """Make dead letters of what waits for its next attempt, or was left behind.

    What runs is left alone. They can be redriven (bus dead redrive).

    Parameters
    ----------
    ids
        These alone.
    why
        What the dead letters will say.
    everything
        All that waits.
    """
    _check_chosen(ids, filters, everything=everything)
    async with common.bus() as bus:
        chosen = await filters.chosen(bus, group, ids).fixed()
        done = await chosen.dead_letter(why, dry_run=True)
        code = _tell_left(ids, done.matched, done.running)
        what = f"give up {many(done.dead_lettered, 'entry', 'entries')} of {group}"
        if consent.given(what, nothing=not done.dead_lettered):
            done = await chosen.dead_letter(why)
            made = many(done.dead_lettered, "dead letter")
            say(f"made {made}{_also(done.gone, done.lost)}")
    if common.json:
        json_line(done, dry_run=consent.dry_run)
    return code


def _check_chosen(ids: tuple[str, ...], filters: Filters, *, everything: bool) -> None:
    if not (ids or everything or filters.any):
        raise DeclarationError("which ones? Say ids, a filter, or --all")


def _tell_left(ids: tuple[str, ...], matched: int, running: int, half_done: int = 0) -> int:
    """Say what is not done, and why; return the exit code: who names entries wants to know."""
    if not matched:
        say("nothing like that is pending")
    if running:
        say(f"left alone, for they run: {running:,}")
    if half_done:
        say(
            f"left alone, for a part of their effects took place: {half_done:,} (bus pending ls"
            " --state half-done); say their ids if they may take place twice",
            "yellow",
        )
    missing = len(set(ids)) - matched
    if ids and missing > 0:
        say(f"{missing:,} of the ids are not pending, or none like that", "yellow")
    return FAILED if ids and (missing > 0 or running) else DONE


def _also(gone: int, lost: int) -> str:
    left = {"were finished meanwhile": gone, "were deleted by hand": lost}
    return "".join(f", {n:,} {what}" for what, n in left.items() if n)


def _document(entry: PendingEntry) -> dict[str, Any]:
    said = {
        "id": entry.id,
        "group": entry.group,
        "stream": entry.stream,
        "state": entry.state,
        "consumer": entry.owner,
        "due_at": entry.due_at,
        "attempts": entry.attempts,
        "idle_s": entry.idle_s,
    }
    event = None if entry.envelope is None else document(entry.envelope)
    return {**said, "event": event}
