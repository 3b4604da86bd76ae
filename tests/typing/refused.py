"""What a type checker must refuse: never run, checked by mypy --strict (test_typing.py).

Each ignore stands for the complaint that must be there: mypy complains of one that is not needed.
"""

from typing import Any

from bus import Backoff, Bus, Delivery, Event, Worker, event_handler, upcast


class Loaned(Event, type="typing.loaned", key="book_id"):
    """A book has left."""

    book_id: str
    days: int = 14


Loaned()  # type: ignore[call-arg]  # a field is missing
Loaned(days=3)  # type: ignore[call-arg]  # the same
Loaned(book_id=5)  # type: ignore[arg-type]  # of a wrong type
Loaned(book_id="b", days="3")  # type: ignore[arg-type]  # the same
Loaned(book_id="b", due=3)  # type: ignore[call-arg]  # no such field
Loaned("b")  # type: ignore[call-arg]  # not by position
Loaned(book_id="b").days = 3  # type: ignore[misc]  # frozen
Loaned(book_id="b").due  # type: ignore[attr-defined]  # no such field  # noqa: B018


@event_handler(Loaned, group="typed")
async def remind(event: Loaned, delivery: Delivery[Loaned]) -> None:
    """Take both."""


event_handler(Loaned)  # type: ignore[call-arg]  # without a group
event_handler(Loaned, group="g", start="end")  # type: ignore[arg-type]
event_handler(Loaned, group="g", backoff=5)  # type: ignore[arg-type]
event_handler(5, group="g")  # type: ignore[arg-type]


@event_handler(Loaned, group="sync")  # type: ignore[arg-type]
def blocking(event: Loaned) -> None:
    """Is not async."""


@event_handler(Loaned, group="many", batch=10)
async def remind_all(deliveries: list[Delivery[Loaned]]) -> None:
    """Take many."""
    deliveries[0].fail("too late")  # type: ignore[arg-type]
    deliveries[0].event.nothing  # type: ignore[attr-defined]  # noqa: B018


event_handler(Loaned, group="g", batch="all")  # type: ignore[arg-type]


@upcast(Loaned, from_version=1)  # type: ignore[type-var]
async def waits(data: dict[str, Any]) -> dict[str, Any]:
    """Is async."""
    return data


@upcast(Loaned, from_version=1)  # type: ignore[type-var]
def forgets(data: dict[str, Any]) -> None:
    """Return nothing."""


upcast(Loaned)  # type: ignore[call-arg]  # without the version
upcast("typing.loaned", from_version=1)  # type: ignore[arg-type]


async def live(bus: Bus, delivery: Delivery[Loaned]) -> None:
    """Use things wrongly."""
    await remind(Loaned(book_id="b"))  # type: ignore[call-arg]  # it takes the delivery too
    await remind("b", delivery)  # type: ignore[arg-type]
    await remind_all(delivery)  # type: ignore[arg-type]
    await bus.publish("an event")  # type: ignore[arg-type]
    await bus.publish(Loaned)  # type: ignore[arg-type]  # the class instead of an event
    await bus.publish_many([1, 2])  # type: ignore[list-item]
    await bus.publish(Loaned(book_id="b"), "id")  # type: ignore[call-arg]
    delivery.event.nothing  # type: ignore[attr-defined]  # noqa: B018
    Worker(bus, [blocking, remind.call])  # type: ignore[list-item]
    Backoff(first_s=1)  # type: ignore[call-arg]
    bus.observe(5, print)  # type: ignore[call-overload]
    bus.emit("an event")  # type: ignore[arg-type]
    bus.hook("hook.publish", 5)  # type: ignore[call-overload]
    await bus.intervene("hook.publish", "an event")  # type: ignore[type-var]
    bus.publish_soon(Loaned(book_id="b"), key="k")  # type: ignore[call-arg]
