"""What stands around publishing in this process: hooks before it, observers behind it.

    hook.publish -> the publisher -> receipt -> observers

A bus without either goes straight to its publisher. What is needed is put around it when the first
hook or observer comes, and taken away when the last has gone; so nobody looks before each event.
"""

from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Protocol

from bus.delivery import BatchCause, Delivery
from bus.event import Event
from bus.hooks import PUBLISH, Hooks
from bus.observers import Observers
from bus.publisher import Publisher, Receipt
from bus.scope import Outgoing
from bus.streams.codec import Headers

Cause = Delivery[Any] | BatchCause | None


class Publishing(Protocol):
    """What a publisher does, and what may stand around one."""

    def publish(
        self, event: Event, event_id: str | None, headers: Headers | None, /
    ) -> Coroutine[Any, Any, Receipt]:
        """Append one event."""

    def publish_many(
        self, events: Iterable[Event], headers: Headers | None, /
    ) -> Coroutine[Any, Any, list[Receipt]]:
        """Append several, all or nothing per stream."""

    def outgoing(
        self, event: Event, event_id: str | None, headers: Headers | None, cause: Cause, /
    ) -> Outgoing:
        """Make an event ready to be appended by a script of others."""


class WayIn:
    """Where events go that are published, by whatever is registered now.

    publish, publish_many, outgoing: as of `Publishing`. tell: told of what an effect has published.
    """

    publish: Callable[[Event, str | None, Headers | None], Coroutine[Any, Any, Receipt]]
    publish_many: Callable[[Iterable[Event], Headers | None], Coroutine[Any, Any, list[Receipt]]]
    outgoing: Callable[[Event, str | None, Headers | None, Cause], Outgoing]

    def __init__(self, hooks: Hooks, observers: Observers) -> None:
        self.tell = observers.tell
        self._hooks = hooks
        self._observers = observers
        self._publisher: Publisher | None = None
        hooks.changed.append(self._choose)
        observers.changed = self._choose

    def lead_to(self, publisher: Publisher) -> None:
        """Lead to that publisher from now on."""
        self._publisher = publisher
        self._choose()

    def _choose(self) -> None:
        """Put around the publisher what somebody is registered for."""
        if self._publisher is None:
            return
        way: Publishing = self._publisher
        if self._observers:
            way = _Observed(way, self._observers)
        if self._hooks.serve(PUBLISH):
            way = _Hooked(way, self._hooks)
        self.publish, self.publish_many, self.outgoing = way.publish, way.publish_many, way.outgoing


class _Observed:
    """Tells observers of what was published, once it was.

    Whoever gives up before the answer is there has no receipt, and nobody is told. Of effects it is
    told when they have taken place, see `Committer` and `Transactions`.
    """

    def __init__(self, inner: Publishing, observers: Observers) -> None:
        self._inner = inner
        self._tell = observers.tell
        self.outgoing = inner.outgoing

    async def publish(self, event: Event, event_id: str | None, headers: Headers | None) -> Receipt:
        receipt = await self._inner.publish(event, event_id, headers)
        self._tell(event, receipt)
        return receipt

    async def publish_many(self, events: Iterable[Event], headers: Headers | None) -> list[Receipt]:
        events = list(events)
        receipts = await self._inner.publish_many(events, headers)
        for event, receipt in zip(events, receipts, strict=True):
            self._tell(event, receipt)
        return receipts


class _Hooked:
    """Asks the hooks of `hook.publish` before anything is encoded or sent."""

    def __init__(self, inner: Publishing, hooks: Hooks) -> None:
        self._inner = inner
        self._hooks = hooks

    async def publish(self, event: Event, event_id: str | None, headers: Headers | None) -> Receipt:
        event = await self._hooks.intervene(PUBLISH, event)
        return await self._inner.publish(event, event_id, headers)

    async def publish_many(self, events: Iterable[Event], headers: Headers | None) -> list[Receipt]:
        asked = [await self._hooks.intervene(PUBLISH, event) for event in events]
        return await self._inner.publish_many(asked, headers)

    def outgoing(
        self, event: Event, event_id: str | None, headers: Headers | None, cause: Cause
    ) -> Outgoing:
        event = self._hooks.intervene_now(PUBLISH, event)
        return self._inner.outgoing(event, event_id, headers, cause)
