"""Where effects are collected, and what becomes of the events among them. Pure.

A delivery is a scope, and so is a transaction; `committer.py` makes them.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from bus.event import Event
from bus.reply import Arg


class Outgoing(msgspec.Struct, frozen=True, gc=False):
    """An event that is ready to be appended, but for its stream.

    routed_by: key or event id, which decides the partition. fields: of the entry, names and values.
    """

    event: Event
    event_id: str
    routed_by: str
    fields: Sequence[Arg]


class Sent(msgspec.Struct, frozen=True, gc=False):
    """Which command, from 0, appends an event, and what decides the stream.

    certain: whether it has no condition.
    """

    command: int
    certain: bool
    event: Event
    event_id: str
    routed_by: str

    @property
    def cls(self) -> type[Event]:
        """The class of the event; says the topic."""
        return self.event.__class__


class Scope(Protocol):
    """Where effects are collected: what they may touch, and how an event becomes an entry."""

    @property
    def tag(self) -> str:
        """The hash tag of the stream, without braces; "" outside a delivery."""

    def admit(self, key: str) -> None:
        """Accept a key. Errors: InvalidEffect, the bus's own, or of another slot than the rest."""

    def join(self, stream: str) -> None:
        """Accept the stream of a published event. Errors: InvalidEffect, of another slot."""

    def outgoing(
        self, event: Event, event_id: str | None, headers: tuple[Any, ...], cause: Any
    ) -> Outgoing:
        """Encode an event that `cause` publishes. Errors: InvalidEvent, EventTooLarge, EventLoop.

        headers: source, time, correlation and causation id, traceparent and tracestate, each None
        if not given. cause: the delivery, None if there is none.
        """
