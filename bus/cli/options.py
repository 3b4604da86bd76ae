"""What all commands have in common: where the server is, how results are to look."""

import logging
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Group, Parameter

from bus.bus import Bus
from bus.cli.output import err, printable
from bus.handler import declared_topics, imported
from bus.streams.address import VARIABLES, shared_url
from bus.telemetry import EVENTS, Telemetry
from bus.topic import Topic

COMMON = Group("Common options", sort_key=90)
# What a command says itself, in its own words.
TOLD_OTHERWISE = ("publish.failed", "redrive.unserved", "replay.failed", "replay.unreadable")
CHANGES = Group("Before it changes anything", sort_key=80)


Apps = Annotated[
    list[str] | None,
    Parameter(
        group=COMMON,
        env_var="BUS_APP",
        negative="",
        help="Package or module whose event classes are to be known; it is imported.",
    ),
]
Json = Annotated[bool, Parameter(group=COMMON, negative="", help="Results as JSON, a line each.")]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Common:
    """The options of every command that asks a server."""

    url: Annotated[
        str | None,
        Parameter(
            group=COMMON,
            env_var=VARIABLES,
            help="redis://, rediss:// or unix://; by default redis://localhost:6379/0.",
        ),
    ] = None
    app: Apps = None
    json: Json = False

    @asynccontextmanager
    async def bus(self) -> AsyncIterator[Bus]:
        """Import the applications, connect, and see that the server takes what is to be changed.

        What the library warns of is said. Errors: DeclarationError, ServerError.
        """
        async with self.looking() as bus:
            await bus.ready()
            yield bus

    @asynccontextmanager
    async def looking(self) -> AsyncIterator[Bus]:
        """Return a bus on whatever server there is, for those who only look, with any rights."""
        bus = Bus.connect(shared_url(self.url), topics=import_apps(self.app))
        hear(bus.telemetry)
        try:
            yield bus
        finally:
            await bus.close()


def import_apps(names: list[str] | None) -> list[Topic]:
    """Import packages, from where one stands, too; return the topics that they declare.

    Errors: DeclarationError.
    """
    if not names:
        return []
    sys.path.insert(0, os.getcwd())  # noqa: PTH109 - as the worker does
    return declared_topics([module for name in names for module in imported(name)])


def hear(telemetry: Telemetry) -> None:
    """Have what the library warns of said on stderr, above a bar that is under way; each once."""
    said: set[tuple[object, ...]] = set()

    def tell(name: str, fields: dict[str, Any]) -> None:
        if EVENTS[name].level < logging.WARNING or name in TOLD_OTHERWISE:
            return
        if fields.get("error_type") == "CancelledError":  # by who pressed Ctrl-C
            return
        about = (name, *(fields.get(f) for f in ("topic", "stream", "group", "error")))
        if about in said:
            return
        said.add(about)
        what, _, _ = EVENTS[name].meaning.partition(";")
        facts = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in fields.items() if v != "")
        err().print(printable(f"warning: {what} ({facts})"), style="yellow", soft_wrap=True)

    telemetry.attach("*", tell)
