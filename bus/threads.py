"""From other threads into the event loop: `bus.publish_soon`, for code that cannot await.

    a thread: publish_soon -> the line -> one wake-up of the loop -> a task per event -> its future

The line keeps the order of the calls, and the loop takes all that stands in it at once. Nothing
waits for ever: whatever ends the bus or its loop gives the futures that are left an outcome.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextvars import Context, copy_context
from datetime import datetime
from typing import Any, NamedTuple, TypedDict

from bus.errors import BusClosed, NotRunning, PublishTimeout, PublishUnknown
from bus.event import Event
from bus.publisher import Receipt


class Stated(TypedDict, total=False):
    """What may be said beside an event; see `Bus.publish`."""

    event_id: str | None
    time: datetime | None
    source: str | None
    correlation_id: str | None
    causation_id: str | None
    traceparent: str | None
    tracestate: str | None


class _Wanted(NamedTuple):
    """One call. context: the caller's, so that what a handler's thread publishes is its doing."""

    future: "Future[Receipt]"
    event: Event
    stated: Stated
    context: Context


class Line:
    """Where other threads put what the loop is to publish; one per bus.

    publish: of the bus. Made or `bind`-ed where the loop runs.
    """

    def __init__(self, publish: Callable[..., Coroutine[Any, Any, Receipt]]) -> None:
        self._publish = publish
        self._lock = threading.Lock()
        self._waiting: deque[_Wanted] = deque()
        self._woken = False  # whether the loop is about to look
        self._closed = False
        self._running: dict[asyncio.Task[Receipt], Future[Receipt]] = {}
        self._keeper: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None

    def bind(self) -> None:
        """Publish in the running loop from now on."""
        self._loop = asyncio.get_running_loop()

    def publish_soon(self, event: Event, stated: Stated) -> "Future[Receipt]":
        """Publish in the loop. See `Bus.publish_soon`."""
        wanted = _Wanted(Future(), event, stated, copy_context())
        with self._lock:
            if self._closed:
                raise BusClosed("the bus is closed: the event was not published")
            if self._loop is None or not self._loop.is_running():
                raise NotRunning(
                    "the bus has no running event loop: the event was not published. Enter"
                    " `async with bus`, or await bus.ready(), in the loop that is to publish, and"
                    " keep that loop running"
                )
            self._waiting.append(wanted)
            if not self._woken:
                self._wake(self._loop)
        return wanted.future

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            loop.call_soon_threadsafe(self._take)
        except RuntimeError:  # it was closed meanwhile
            self._waiting.clear()
            raise NotRunning(
                "the bus's event loop has just ended: the event was not published"
            ) from None
        self._woken = True

    def _take(self) -> None:
        """Publish all that stand in line, in their order. In the loop."""
        with self._lock:
            waiting, self._waiting = self._waiting, deque()
            self._woken = False
        loop = asyncio.get_running_loop()
        if waiting and self._keeper is None:
            self._keeper = loop.create_task(self._keep(), name="publish_soon")
        for wanted in waiting:
            if wanted.future.set_running_or_notify_cancel():
                publishing = self._publish(wanted.event, **wanted.stated)
                task = loop.create_task(publishing, context=wanted.context)
                self._running[task] = wanted.future
                task.add_done_callback(self._answer)

    def _answer(self, task: asyncio.Task[Receipt]) -> None:
        future = self._running.pop(task, None)
        if future is None:  # it has been told that the loop ends
            return
        if task.cancelled():
            future.set_exception(_cut_off())
        elif (error := task.exception()) is not None:
            future.set_exception(error)
        else:
            future.set_result(task.result())

    async def _keep(self) -> None:
        """Notice that the loop ends without the bus having been closed."""
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._end()

    def _end(self) -> None:
        """Take no more, and tell all who have no outcome: the loop may go round no more."""
        with self._lock:
            self._loop = self._keeper = None
            waiting, self._waiting = self._waiting, deque()
        for wanted in waiting:
            if wanted.future.set_running_or_notify_cancel():
                wanted.future.set_exception(
                    PublishTimeout("the event loop ended first: the event was not published")
                )
        running, self._running = self._running, {}
        for task, future in running.items():
            future.set_exception(_cut_off())
            task.cancel()

    async def close(self) -> None:
        """Take no more, publish who stands in line, and wait until all have an outcome."""
        with self._lock:
            self._closed = True
        if self._waiting:
            self._take()
        if self._running:
            await asyncio.wait(list(self._running))
        if self._keeper is not None:
            self._keeper.cancel()


def _cut_off() -> PublishUnknown:
    return PublishUnknown("the event loop ended first: the event may have been published")
