"""`bus consumers`: list, remove those that are gone."""

from typing import NamedTuple

from cyclopts import App

from bus.cli.codes import DONE, FAILED
from bus.cli.consent import Consent
from bus.cli.groups import Topic, Topics, rows
from bus.cli.names import Name, shown
from bus.cli.options import Common
from bus.cli.output import Column, json_line, many, say, show, table
from bus.cli.tables import age
from bus.history.snapshot import ConsumerSnapshot

app = App(
    name="consumers", help="Consumers: list, remove those that are gone.", help_format="plaintext"
)
_COMMON, _CONSENT = Common(), Consent()


class _Row(NamedTuple):
    topic: str
    group: str
    consumer: ConsumerSnapshot


COLUMNS: tuple[Column, ...] = (
    ("topic", lambda r: r.topic),
    ("group", lambda r: r.group),
    ("consumer", lambda r: r.consumer.name),
    ("", lambda r: "alive" if r.consumer.alive else "gone"),
    ("pending", lambda r: r.consumer.pending),
    ("idle", lambda r: age(r.consumer.idle_s)),
)


@app.command(name="ls")
async def list_consumers(*groups: Name, topic: Topics = None, common: Common = _COMMON) -> None:
    """List the consumers of groups: workers that live, or are gone, and what they have.

    Parameters
    ----------
    groups
        Of these alone.
    """
    async with common.looking() as bus:
        found = [
            _Row(row.topic.name, row.group.group, consumer)
            for row in await rows(bus, groups, topic)
            for consumer in row.group.consumers
        ]
    if common.json:
        for row in found:
            json_line(row.consumer, topic=row.topic, group=row.group)
    else:
        show(table(found, COLUMNS, empty="no consumer"))


@app.command(name="rm")
async def remove(
    name: Name,
    /,
    *,
    group: Name,
    topic: Topic = None,
    consent: Consent = _CONSENT,
    common: Common = _COMMON,
) -> int:
    """Remove a consumer whose worker is gone; others may take at once what it had.

    Workers do that by themselves within seconds, for workers of their own kind. One that is alive
    is refused.
    """
    async with common.bus() as bus:
        found = await bus.admin.remove_consumer(name, group, topic, dry_run=True)
        code = DONE if found else FAILED
        if not found:
            say(f"group {shown(group)} has no consumer {shown(name)}")
        had = sum(each.handed_back for each in found)
        entries = many(had, "entry", "entries")
        what = f"remove {shown(name)} from {shown(group)}, and hand {entries} back"
        if consent.given(what, nothing=not found):
            found = await bus.admin.remove_consumer(name, group, topic)
            had = sum(each.handed_back for each in found)
            say(f"removed {shown(name)}, handed back {many(had, 'entry', 'entries')}")
    if common.json:
        for each in found:
            json_line(each, dry_run=consent.dry_run)
    return code
