"""`bus publish`: one event, the same again and again, or one per line of input."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from functools import partial
from types import TracebackType
from typing import Annotated, Self

from cyclopts import Parameter

from bus.bus import Bus
from bus.cli.input import documents
from bus.cli.options import Common
from bus.cli.output import json_line, line, many, say
from bus.cli.progress import Bar
from bus.config import checked_name
from bus.errors import BusError, DeclarationError, InvalidEvent, Undecodable, UnknownTopic
from bus.event import Event, checked_type, find, known_events, newest_version
from bus.history.throttle import Throttle
from bus.publisher import Receipt
from bus.raw import raw_event
from bus.streams.codec import Located, decode
from bus.streams.keys import tag_of

_COMMON = Common()
NAMED = 20  # lines that are named when they were not published


@dataclass(frozen=True, slots=True)
class _Template:
    """How data becomes an event: by its class if one is known, else as it is."""

    type: str
    version: int | None
    key: str | None
    topic: str | None

    @property
    def known(self) -> bool:
        """Whether a class of the type is known."""
        return newest_version(self.type) > 0

    def event(self, data: bytes) -> Event:
        """Return the event. Errors: InvalidEvent, DeclarationError, UnknownEventType."""
        if not self.known:
            version = self.version or 1
            return raw_event(self.type, data, key=self.key, version=version, topic=self.topic)
        if self.key is not None or self.topic is not None:
            raise DeclarationError(f"the class of {self.type} says what its key and topic are")
        info = find(self.type, self.version or newest_version(self.type))
        try:
            return decode(info, Located(b"", None, None, None, data))
        except Undecodable as error:
            raise InvalidEvent(str(error)) from None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Headers:
    """What may travel beside the event."""

    id: Annotated[str | None, Parameter(help="Of the event; by default a new one.")] = None
    source: Annotated[str | None, Parameter(help="Who publishes it.")] = None
    time: Annotated[datetime | None, Parameter(help="When it happened, ISO 8601 with a zone.")] = (
        None
    )
    correlation_id: Annotated[str | None, Parameter(help="Of what it belongs to.")] = None
    causation_id: Annotated[str | None, Parameter(help="Of the event that caused it.")] = None
    traceparent: Annotated[str | None, Parameter(help="W3C trace context.")] = None


_HEADERS = Headers()


async def publish(
    type: str,
    data: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    /,
    *,
    key: str | None = None,
    version: int | None = None,
    topic: str | None = None,
    raw: Annotated[bool, Parameter(negative="")] = False,
    new_topic: Annotated[bool, Parameter(negative="")] = False,
    lines: Annotated[bool, Parameter(negative="")] = False,
    count: int = 1,
    rate: float | None = None,
    headers: Headers = _HEADERS,
    common: Common = _COMMON,
) -> None:
    """Publish an event, and say where it is.

    For example:

      bus publish order.paid '{"order_id": "o-1", "cents": 1250}' --app handlers
      bus publish order.paid @orders.jsonl --lines --rate 500

    If a class of the type is known (--app), the data must be what it declares. Without --app any
    JSON object is published as it is, and nothing checks that handlers can read it.

    Parameters
    ----------
    type
        Such as order.paid; its first segment is the topic.
    data
        The event as JSON, @FILE to read it from one, or - for stdin, the default where that is no
        terminal.
    key
        What decides the partition, of a type that is not known here.
    version
        Of the type; by default the newest that is known.
    topic
        Where it is kept, of a type that is not known here.
    raw
        As it is, although --app knows no class of the type.
    new_topic
        Of a type that is not known here: make its topic, if there is none yet.
    lines
        Every line is an event. Those that are sent together go side by side: if one is refused,
        it is said which were not published.
    count
        Publish it so many times.
    rate
        So many a second at most.
    """
    if count < 1:
        raise DeclarationError("--count is a whole number from 1")
    if headers.id is not None and (count > 1 or lines):
        raise DeclarationError("--id is of one event: leave out --count and --lines")
    template = _Template(checked_type(type, "the event"), version, key, topic)
    throttle = Throttle(rate)
    async with common.bus() as bus:
        if not template.known:
            if common.app and not raw:
                raise _unknown(type)
            if not new_topic:
                await _check_topic(bus, template)
            say(f"{type} is not checked: no class of it is known here (--app PACKAGE)", "yellow")
        total = None if lines else count
        with _Run(bus, headers, throttle, total, json=common.json) as publishing:
            async with aclosing(documents(data, lines=lines)) as found:
                async for part in found:
                    for where, document in part:
                        await publishing.add(where, partial(template.event, document), count)
                    await publishing.flush()
    if not common.json and publishing.published > 1:
        say(f"published {many(publishing.published, 'event')}")


def _unknown(type: str) -> DeclarationError:
    known = {info.type for info in known_events()}
    close = get_close_matches(type, known, 1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(known))}"
    return DeclarationError(
        f"no class of {type} is known: {hint} --raw publishes it all the same, as it is"
    )


async def _check_topic(bus: Bus, template: _Template) -> None:
    """Refuse to make a topic by a slip of the keyboard. Errors: UnknownTopic."""
    name = template.topic or template.type.partition(".")[0]
    try:
        await bus.topics.existing(checked_name(name, "topic name"))
    except UnknownTopic as error:
        error.add_note("to make it, say --new-topic")
        raise


class _Run:
    """One session of publishing, in batches that go together."""

    def __init__(
        self, bus: Bus, headers: Headers, throttle: Throttle, total: int | None, *, json: bool
    ) -> None:
        self._bus = bus
        self._headers = headers
        self._throttle = throttle
        self._total = total
        self._json = json
        self._batch: list[tuple[str, Event]] = []
        self._bar = Bar("publish")
        self.published = 0

    async def add(self, where: str, made: Callable[[], Event], count: int) -> None:
        """Publish an event so many times, soon. where: it came from, for errors."""
        try:
            event = made()
        except BusError as error:
            await self.flush()
            if where:
                error.add_note(f"it was {where}; {self._so_far()}, and nothing behind it was tried")
            raise
        for _ in range(count):
            self._batch.append((where, event))
            if len(self._batch) >= self._throttle.most:
                await self.flush()

    async def flush(self) -> None:
        """Publish what is held. Errors: those of `Bus.publish`; a note says what is in."""
        batch, self._batch = self._batch, []
        headers = self._headers
        try:
            outcomes = await asyncio.gather(
                *(
                    self._bus.publish(
                        event,
                        event_id=headers.id,
                        time=headers.time,
                        source=headers.source,
                        correlation_id=headers.correlation_id,
                        causation_id=headers.causation_id,
                        traceparent=headers.traceparent,
                    )
                    for _, event in batch
                ),
                return_exceptions=True,
            )
        except asyncio.CancelledError:
            if self._total != 1:
                say(f"{self._so_far()}; of {len(batch):,} more nobody knows", "yellow")
            raise
        for outcome in outcomes:
            if isinstance(outcome, Receipt):
                self.published += 1
                self._show(outcome)
        self._check(batch, outcomes)
        share = None if self._total is None else self.published / self._total
        self._bar.at(share, f"{self.published:,}")
        await self._throttle.passed(len(batch))

    def _check(
        self, batch: list[tuple[str, Event]], outcomes: list[Receipt | BaseException]
    ) -> None:
        """Raise the first error of a batch, with what became of the others."""
        failed = [
            (where, outcome)
            for (where, _), outcome in zip(batch, outcomes, strict=True)
            if isinstance(outcome, BaseException)
        ]
        if not failed:
            return
        where, error = failed[0]
        if self._total != 1:
            error.add_note(f"{self._so_far()}, and nothing behind these was tried")
        if where:
            named = ", ".join(where for where, _ in failed[:NAMED])
            more = f" and {len(failed) - NAMED:,} more" if len(failed) > NAMED else ""
            error.add_note(f"not published, or nobody knows: {named}{more}")
        raise error

    def _so_far(self) -> str:
        return f"{many(self.published, 'event')} were published"

    def _show(self, receipt: Receipt) -> None:
        place = f"{tag_of(receipt.stream)}/{receipt.entry_id}"
        if self._json:
            json_line(receipt, id=place)
        elif self._total == 1:
            line((place, ""), (receipt.event_id, "dim"))

    def __enter__(self) -> Self:
        """Show how far it is, where it takes long."""
        if self._total != 1:
            self._bar.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave it where it is."""
        if self._total != 1:
            self._bar.__exit__(kind, error, trace)
