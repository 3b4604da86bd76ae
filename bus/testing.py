"""Tests of what uses a bus: handlers run until nothing is left, and what was published.

For any test framework and any bus; `bus/pytest_plugin.py` has buses for pytest.

    await drained(bus_memory, notify_user)
    assert await published(bus_memory, UserNotified) == [UserNotified(user="ada")]
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any, TypeVar, overload

from bus.backoff import Backoff
from bus.bus import Bus
from bus.envelope import Envelope, order
from bus.errors import UnknownGroup
from bus.event import Event
from bus.handler import Handler
from bus.history.letter import Letter
from bus.worker.supervisor import Worker

DRAINED_S = 10.0  # seconds; a test that takes longer usually waits for nothing
AT_ONCE = Backoff(base_s=0.001, factor=1.0, jitter=0.0)

E = TypeVar("E", bound=Event)


class HandlersFailed(AssertionError):
    """Handlers have left dead letters. letters: these; the text has their tracebacks."""

    def __init__(self, letters: Sequence[Letter]) -> None:
        super().__init__("\n\n".join(map(_told, letters)))
        self.letters = list(letters)


@overload
async def published(bus: Bus, what: type[E], /) -> list[E]: ...
@overload
async def published(bus: Bus, /, *what: type[Event] | str) -> list[Event]: ...
async def published(bus: Bus, /, *what: type[Event] | str) -> list[Any]:
    """Return the events that the topics hold, oldest first: all, or of classes, types or patterns.

    On a server those of one millisecond are in order within a partition only. XRANGE of all topics
    there are: for tests. Errors: DeclarationError for a bad pattern;
    Undecodable, UnknownEventType for an entry that is not what its type says; ServerError.
    """
    found: list[Envelope] = []
    for topic in await bus.topics.known():
        found += [e async for e in bus.history(topic, types=what or None)]
    return [envelope.event for envelope in sorted(found, key=lambda e: order(e.entry_id))]


async def drained(
    bus: Bus,
    /,
    *handlers: Handler[...],
    lifespan: Callable[[Any], AbstractAsyncContextManager[Any]] | None = None,
    timeout_s: float = DRAINED_S,
    dead: bool = False,
) -> list[Letter]:
    """Run handlers in a worker until nothing is left for them to do; return their dead letters.

    Also what they publish for each other. They run as they would, but a retry comes at once and no
    breaker holds anything up: what fails is tried `max_attempts` times within the test.
    lifespan: as of `Worker`. timeout_s: for all of it, in seconds.
    dead: whether events may end as dead letters; those that were there before are not looked at.
    Errors: HandlersFailed for dead letters that may not be; TimeoutError that says what is left;
    what breaks a worker.
    """
    groups = [handler.group for handler in handlers]
    before = {letter.id for letter in await _letters(bus, groups)}
    prompt = [replace(handler, backoff=AT_ONCE, breaker=None) for handler in handlers]
    async with Worker(bus, prompt, lifespan=lifespan) as worker:
        await _quiet(bus, worker, timeout_s)
    left = [letter for letter in await _letters(bus, groups) if letter.id not in before]
    if left and not dead:
        raise HandlersFailed(left)
    return left


async def _quiet(bus: Bus, worker: Worker, timeout_s: float) -> None:
    """Wait until none has anything to do, and none has published while it was looked at."""
    loop, heard = asyncio.get_running_loop(), [True]
    deadline = loop.time() + timeout_s

    def hear(_name: str, _fields: dict[str, Any]) -> None:
        heard.append(True)

    bus.telemetry.attach("publish.appended", hear)
    bus.telemetry.attach("effects.published", hear)
    try:
        while heard:
            heard.clear()
            await worker.drained(max(0.0, deadline - loop.time()))
    finally:
        bus.telemetry.detach(hear)


async def _letters(bus: Bus, groups: Iterable[str]) -> list[Letter]:
    found: list[Letter] = []
    for group in groups:
        try:
            found += [letter async for letter in bus.dead_letters(group)]
        except UnknownGroup:
            continue  # it was never served
    return found


def _told(letter: Letter) -> str:
    said = f"{letter.group} has left a dead letter, {letter.id}: {letter.reason}: {letter.error}"
    return f"{said}\n{letter.traceback}".rstrip()
