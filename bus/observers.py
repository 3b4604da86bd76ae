"""Observers: told of what was published, in this process; they delay and harm nobody.

    a publish has succeeded, or `emit` -> Observers.tell -> each one's queue -> its own task

Telling is an append to a bounded queue for each observer that wants the event. What becomes of it
is the observer's own business: one that is slow loses its oldest events, which is counted and told;
one that raises is told of, too, and goes on with the next.
"""

import asyncio
import inspect
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from types import TracebackType
from typing import Any, Generic, ParamSpec, Self, TypeVar

from bus.config import (
    OBSERVER_GRACE_S,
    OBSERVER_MAXLEN,
    OBSERVER_TOLD_S,
    TURN_S,
    checked_number,
)
from bus.errors import BusClosed, DeclarationError, InvalidEvent, NotRunning, words_of
from bus.event import QUESTIONS, Event, info_of, pattern_of, type_matches
from bus.publisher import Receipt
from bus.signature import needs_two
from bus.telemetry import Telemetry

P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E", bound=Event)
Told = tuple[Event, Receipt | None]

_REMEMBERED = 10_000  # event classes; raw events have classes of their own


class _Queue:
    """What one observer has yet to see: bounded, the oldest go first.

    wake: called once when something is put; None while nobody waits for that.
    """

    def __init__(self, observers: "Observers", what: str | type[Event], maxlen: int) -> None:
        self.pattern = pattern_of(what)
        if self.pattern.partition(".")[0] == QUESTIONS:
            raise DeclarationError(
                f"{self.pattern}: what is asked at a hook is told to nobody; use bus.hook"
            )
        checked_number(maxlen, "maxlen", 1, 1_000_000, whole=True)
        self.maxlen = maxlen
        self.name = self.pattern
        self.dropped = 0
        self.closed = False
        self.wake: Callable[[], None] | None = None
        self._task: asyncio.Task[None] | None = None  # who sees them, if that is one of ours
        self._observers = observers
        self._told: deque[Told] = deque()
        self._untold = 0  # of those dropped
        self._told_at = float("-inf")  # loop time at which drops were told last

    def put(self, told: Told) -> None:
        """Add what the observer is to see; wake it."""
        if len(self._told) >= self.maxlen:
            self._drop(1)
            self._told.popleft()
        self._told.append(told)
        self._wake_up()

    async def more(self) -> None:
        """Wait until something is put, or the queue is closed."""
        if self.wake is not None:
            raise RuntimeError(f"{self!r} is waited for already: one task iterates over it")
        waiting = asyncio.get_running_loop().create_future()
        self.wake = wake = lambda: None if waiting.done() else waiting.set_result(None)
        try:
            await waiting
        finally:
            if self.wake is wake:
                self.wake = None

    def _wake_up(self) -> None:
        wake, self.wake = self.wake, None
        if self._task is not None and self._task.get_loop().is_closed():
            self._task = None
            wake = None if self.closed else self._start
        if wake is not None:
            with suppress(RuntimeError):  # who waits is in a loop that was closed since
                wake()

    def _start(self) -> None:
        """Begin to see what is there, if that is the queue's own business."""

    def _drop(self, count: int) -> None:
        self.dropped += count
        self._untold += count
        if asyncio.get_running_loop().time() - self._told_at >= OBSERVER_TOLD_S:
            self.tell_dropped()

    def tell_dropped(self) -> None:
        """Tell of those that were dropped and not told of yet."""
        if self._untold:
            count, self._untold = self._untold, 0
            self._told_at = asyncio.get_running_loop().time()
            self._observers.telemetry.emit(
                "observer.dropped", observer=self.name, pattern=self.pattern, count=count
            )

    def close(self) -> None:
        """Be told no more. A second time does nothing."""
        self.closed = True
        self._observers.remove(self)
        self._wake_up()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} of {self.pattern}>"


class Observer(_Queue, Generic[P, R]):
    """A function that is told of events; made by `bus.observe`. Calling it calls the function.

    dropped: events it was not told of, because it was `maxlen` behind. failed: calls that raised.
    """

    def __init__(
        self, observers: "Observers", what: str | type[Event], call: Callable[P, R], maxlen: int
    ) -> None:
        super().__init__(observers, what, maxlen)
        if not callable(call):
            raise DeclarationError(f"an observer is a function of an event, not {call!r}")
        self.name = getattr(call, "__qualname__", repr(call))
        self.failed = 0
        self._call = call
        self._takes_receipt = needs_two(call, f"observer {self.name}", "receipt")
        self._context = copy_context()  # not that of whoever publishes first
        self.wake = self._start

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function as it is."""
        return self._call(*args, **kwargs)

    def close(self) -> None:
        """Be told no more; a call that runs is cancelled, what waits is dropped, uncounted."""
        self._told.clear()
        self.finish()
        self._cancel()

    def finish(self) -> "asyncio.Task[None] | None":
        """Be told no more, but see what is there; return the task that does."""
        self.closed = True
        if self.wake == self._start:
            self.wake = None
        super().close()
        return self._task

    def give_up(self) -> None:
        """See no more of what is there: it is dropped, and what runs is cancelled."""
        if self._told:
            self._drop(len(self._told))
            self._told.clear()
        self._cancel()
        self.tell_dropped()

    def _cancel(self) -> None:
        task = self._task
        if task is not None and task is not _current_task() and not task.get_loop().is_closed():
            task.cancel()

    def resume(self) -> None:
        """Be told again."""
        self.closed, self.wake = False, self._start

    def forget(self) -> None:
        """Begin anew, in a forked child: the task and what it was to see are the parent's."""
        self._told.clear()
        self._task, self.wake = None, self._start

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(self._run(), name=self.name, context=self._context)

    async def _run(self) -> None:
        this = asyncio.current_task()
        clock = asyncio.get_running_loop().time
        turn_ends = clock() + TURN_S
        try:
            while True:
                while self._told:
                    await self._see(*self._told.popleft())
                    if clock() > turn_ends:
                        await asyncio.sleep(0)
                        turn_ends = clock() + TURN_S
                self.tell_dropped()
                if self.closed:
                    return
                await self.more()
                turn_ends = clock() + TURN_S
        finally:
            if self._task is this:  # not if it was left behind in a loop of before
                self._task = None
                self.wake = None if self.closed else self._start  # in another loop, perhaps

    async def _see(self, event: Event, receipt: Receipt | None) -> None:
        """Call the function; what it raises is told and counted."""
        call: Callable[..., Any] = self._call
        try:
            answer = call(event, receipt) if self._takes_receipt else call(event)
            if answer is not None and inspect.isawaitable(answer):
                await answer
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # ours: it is closed, or the loop ends
            self._fail(error)
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise  # the program ends, or the loop has ended without cancelling us
        except BaseException as error:  # as of pytest.fail, which is no Exception
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self.failed += 1
        frame = traceback.extract_tb(error.__traceback__)[-1]
        self._observers.telemetry.emit(
            "observer.failed",
            observer=self.name,
            pattern=self.pattern,
            error_type=type(error).__name__,
            error=words_of(error),
            where=f"{frame.filename}:{frame.lineno} {frame.name}",
        )


class Observed(_Queue):
    """Events to iterate over, in a block; made by `bus.observed`.

    async with bus.observed("model.*") as events:
        async for event in events: ...

    dropped: events that were not seen, because the loop was `maxlen` behind. It ends when the bus
    is closed. One task iterates at a time.
    """

    _entered = False

    async def __aenter__(self) -> Self:
        """Be told from now on. Errors: BusClosed."""
        if self._entered:
            raise DeclarationError(f"{self!r} is used once: ask the bus for another")
        self._observers.add(self)
        self._entered = True
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Be told no more."""
        self.tell_dropped()
        self.close()

    def __aiter__(self) -> Self:
        if not self._entered:
            raise DeclarationError(
                "iterate in its block: async with bus.observed(...) as events, which also ends it"
            )
        return self

    async def __anext__(self) -> Event:
        while not self._told:
            self.tell_dropped()
            if self.closed:
                raise StopAsyncIteration
            await self.more()
        return self._told.popleft()[0]


class Observers:
    """The observers of one bus.

    changed: called when one has come or gone, so that nobody has to look before each event.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self.telemetry = telemetry
        self.changed: Callable[[], None] = lambda: None
        self._all: list[_Queue] = []
        self._of: dict[type[Event], tuple[_Queue, ...]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._left: list[Observer[..., Any]] = []  # those there were when it was closed

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._all)

    def observe(
        self, what: str | type[Event], call: Callable[P, R], maxlen: int = OBSERVER_MAXLEN
    ) -> Observer[P, R]:
        """Register an observer. Errors: DeclarationError, BusClosed."""
        observer = Observer(self, what, call, maxlen)
        self.add(observer)
        return observer

    def observed(self, what: str | type[Event], maxlen: int = OBSERVER_MAXLEN) -> Observed:
        """Return what is registered by its block. Errors: DeclarationError."""
        return Observed(self, what, maxlen)

    def add(self, queue: _Queue) -> None:
        """Tell it from now on. Errors: BusClosed."""
        if self._closed:
            raise BusClosed("the bus is closed: nothing will be told any more")
        self._all.append(queue)
        self._of.clear()
        self.changed()

    def remove(self, queue: _Queue) -> None:
        """Tell it no more; one that is not there is no error."""
        self._all = [other for other in self._all if other is not queue]
        self._left = [other for other in self._left if other is not queue]
        self._of.clear()
        self.changed()

    def tell(self, event: Event, receipt: Receipt | None) -> None:
        """Tell all who want it of an event. Errors: those of `_wanting`."""
        queues = self._of.get(event.__class__)
        if queues is None:
            queues = self._wanting(event)
        if queues:
            told = event, receipt
            for queue in queues:
                queue.put(told)

    def emit(self, event: Event) -> None:
        """Tell of an event that is published nowhere. See `Bus.emit`."""
        if self._closed:
            raise BusClosed("the bus is closed: nobody is told any more")
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        if loop is not self._loop or loop is None:
            self._move_to(loop)
        self.tell(event, None)

    def _move_to(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Tell in another loop from now on. Errors: NotRunning, if the one before still runs."""
        if loop is None or (self._loop is not None and self._loop.is_running()):
            raise NotRunning(
                "emit tells observers in the bus's event loop, and this is another thread:"
                " loop.call_soon_threadsafe(bus.emit, event)"
            )
        self._loop = loop

    def _wanting(self, event: Event) -> tuple[_Queue, ...]:
        """Return who wants events of a class. Errors: InvalidEvent, DeclarationError."""
        cls = event.__class__
        if not issubclass(cls, Event):
            raise InvalidEvent(f"observers are told of events, not of {cls.__name__}")
        info = info_of(cls)
        if info.family == QUESTIONS:
            raise InvalidEvent(
                f"{info.type} is a question: ask it with bus.intervene; nobody observes it"
            )
        queues = tuple(q for q in self._all if type_matches(q.pattern, info.type))
        if len(self._of) > _REMEMBERED:
            self._of.clear()
        self._of[cls] = queues
        return queues

    async def close(self) -> None:
        """Tell of nothing more; let observers see what they were told of, for a second at most."""
        self._closed = True
        loop = asyncio.get_running_loop()
        observers: list[Observer[..., Any]] = []
        tasks = set()
        for queue in self._all:
            if isinstance(queue, Observer):
                observers.append(queue)
                task = queue.finish()
                if task is not None and task.get_loop() is loop:
                    tasks.add(task)
            else:
                queue.close()
        tasks.discard(_current_task())  # it may close its own bus
        late = tasks and (await asyncio.wait(tasks, timeout=OBSERVER_GRACE_S))[1]
        self._left = observers
        for observer in observers:
            observer.give_up()
        if late:  # one that ignores its cancellation cannot be waited for
            await asyncio.wait(late, timeout=OBSERVER_GRACE_S)

    def resume(self) -> None:
        """Tell those again whom closing has ended. Those who have closed themselves stay away."""
        self._closed = False
        left, self._left = self._left, []
        for observer in left:
            observer.resume()
            self.add(observer)

    def forget(self) -> None:
        """Begin anew, in a forked child."""
        self._loop = None
        for queue in self._all:
            if isinstance(queue, Observer):
                queue.forget()


def _current_task() -> "asyncio.Task[Any] | None":
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs here
        return None
