"""From other threads into the event loop: `bus.publish_soon`, for code that cannot await.

    a thread: publish_soon -> the line -> one wake-up of the loop -> a task per event -> its future

The line keeps the order of the calls, and the loop takes all that stands in it at once. Nothing
waits for ever: whatever ends the bus or its loop gives the futures that are left an outcome.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
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


_MAY_BE_STATED = frozenset(Stated.__optional_keys__)


class _Wanted(NamedTuple):
    """One call. context: the caller's, so that what a handler's thread publishes is its doing."""

    future: "Future[Receipt]"
    event: Event
    stated: Stated
    context: Context


class Line:
    """Where other threads put what the loop is to publish; one per bus.

    publish: of the bus. Made, `bind`-ed or first called where the loop runs.
    """

    def __init__(self, publish: Callable[..., Coroutine[Any, Any, Receipt]]) -> None:
        self._publish = publish
        self._lock = threading.Lock()
        self._waiting: deque[_Wanted] = deque()
        self._woken = False  # whether the loop is about to look
        self._closed = False
        self._running: dict[asyncio.Task[Receipt], Future[Receipt]] = {}
        self._keeper: AsyncGenerator[None, None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        if _running_loop() is not None:
            self.bind()

    def bind(self) -> None:
        """Publish in the running loop from now on."""
        loop = asyncio.get_running_loop()
        if loop is self._loop:
            return
        if self._loop is not None and not self._loop.is_running():
            self._end()  # nobody has said that it goes round no more
        self._keeper = self._keep(loop)
        with suppress(StopIteration):  # begun, so that the loop knows it; it stops at its yield
            self._keeper.__anext__().send(None)
        with self._lock:
            self._loop = loop

    def publish_soon(self, event: Event, stated: Stated) -> "Future[Receipt]":
        """Publish in the loop. See `Bus.publish_soon`."""
        if not stated.keys() <= _MAY_BE_STATED:
            raise TypeError(
                f"publish_soon takes {', '.join(sorted(_MAY_BE_STATED))} beside the event, not"
                f" {', '.join(sorted(stated.keys() - _MAY_BE_STATED))}"
            )
        if self._keeper is None and _running_loop() is not None:
            self.bind()
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
        for wanted in waiting:
            if wanted.future.set_running_or_notify_cancel():
                self._begin(wanted)

    def _begin(self, wanted: _Wanted) -> None:
        try:
            publishing = self._publish(wanted.event, **wanted.stated)
            task = asyncio.get_running_loop().create_task(publishing, context=wanted.context)
        except Exception as error:  # of this call alone: those behind it stand in line, too
            wanted.future.set_exception(error)
            return
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

    async def _keep(self, loop: asyncio.AbstractEventLoop) -> AsyncGenerator[None, None]:
        """Notice that the loop ends without the bus having been closed.

        A loop closes the generators begun in it after it has cancelled the tasks, whenever that is.
        A task would not do: one that is made after the others were cancelled is left behind, and
        one that is there from the start is reported by loops that cancel none.
        """
        try:
            yield
        finally:
            if self._loop is loop:
                self._end()

    def _end(self) -> None:
        """Take no more, and tell all who have no outcome: the loop may go round no more."""
        with self._lock:
            loop, self._loop, self._woken = self._loop, None, False
            waiting, self._waiting = self._waiting, deque()
        for wanted in waiting:
            if wanted.future.set_running_or_notify_cancel():
                wanted.future.set_exception(
                    PublishTimeout("the event loop ended first: the event was not published")
                )
        running, self._running = self._running, {}
        for task, future in running.items():
            future.set_exception(_cut_off())
            if loop is _running_loop():
                task.cancel()

    async def close(self) -> None:
        """Take no more, publish who stands in line, and wait until all have an outcome."""
        with self._lock:
            self._closed = True
        if self._loop is not asyncio.get_running_loop():
            self._end()  # what it has left, nobody else can wait for
        if self._waiting:
            self._take()
        if self._running:
            await asyncio.wait(list(self._running))
        if self._keeper is not None:
            await self._keeper.aclose()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _cut_off() -> PublishUnknown:
    return PublishUnknown("the event loop ended first: the event may have been published")
