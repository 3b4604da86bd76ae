"""The half of the facade that needs no server: observers, hooks, threads. It only delegates."""

from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from typing import Any, ParamSpec, Protocol, TypeVar, Unpack, overload

from bus.config import OBSERVER_MAXLEN
from bus.event import Event
from bus.hooks import Hook, Hooks
from bus.observers import Observed, Observer, Observers
from bus.publisher import Receipt
from bus.telemetry import Telemetry
from bus.threads import Line, Stated
from bus.way_in import WayIn

P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E", bound=Event)


class _MakesObserver(Protocol):
    def __call__(self, callback: Callable[P, R], /) -> Observer[P, R]: ...


class _MakesHook(Protocol):
    def __call__(self, fn: Callable[P, R], /) -> Hook[P, R]: ...


class Local:
    """What a bus does in its own process."""

    def __init__(self, publish: Callable[..., Coroutine[Any, Any, Receipt]]) -> None:
        self.telemetry = Telemetry()
        self.hooks = Hooks()
        self._observers = Observers(self.telemetry)
        self._way_in = WayIn(self.hooks, self._observers)
        self._publish = publish
        self._line = Line(publish)
        self._parents: list[Line] = []

    def _begin_anew(self) -> None:
        """Leave to the parent, in a forked child, what it was doing."""
        self._observers.forget()
        self._parents.append(self._line)  # one that went would wake the parent's loop
        self._line = Line(self._publish)

    def _resume(self) -> None:
        """Go on after it was closed."""
        self._observers.resume()
        self._line = Line(self._publish)

    # --- observers: told, never waited for

    @overload
    def observe(
        self,
        pattern: str | type[Event],
        callback: Callable[..., Any],
        *,
        maxlen: int = OBSERVER_MAXLEN,
    ) -> Observer[..., Any]: ...
    @overload
    def observe(
        self, pattern: str | type[Event], callback: None = None, *, maxlen: int = OBSERVER_MAXLEN
    ) -> _MakesObserver: ...
    def observe(
        self,
        pattern: str | type[Event],
        callback: Callable[..., Any] | None = None,
        *,
        maxlen: int = OBSERVER_MAXLEN,
    ) -> Any:
        """Have `callback` told of events of this process, after they were published, or emitted.

        pattern: an event class, type or pattern. callback: plain or async, of (event) or (event,
            receipt), one call at a time, in the order of publishing; the receipt is None for what
            was emitted, or published as an effect of a handler. Without it this is a decorator.
            A plain one runs in the event loop: it must be quick.
        maxlen: how many events it may be behind; then it loses its oldest (`.dropped`, telemetry).
        It delays neither the publisher nor other observers. What it raises is told by telemetry and
        counted (`.failed`). Closing the bus gives observers a second to catch up.
        Errors: DeclarationError, BusClosed.
        """
        if callback is None:
            return lambda call: self._observers.observe(pattern, call, maxlen)
        return self._observers.observe(pattern, callback, maxlen)

    def observed(self, pattern: str | type[Event], *, maxlen: int = OBSERVER_MAXLEN) -> Observed:
        """Return the same as a block: `async with bus.observed("model.*") as events`.

        Iterate over it: what is published once the block is entered. When the loop is `maxlen`
        behind, the oldest are lost (`.dropped`). The iteration ends when the bus is closed.
        Errors: DeclarationError; BusClosed as the block is entered.
        """
        return self._observers.observed(pattern, maxlen)

    def emit(self, event: Event) -> None:
        """Tell observers, and nobody else: nothing is sent or kept, no hook is asked.

        Needs no connection; about a microsecond per observer. In the event loop of the bus.
        Errors: InvalidEvent, DeclarationError for a class without a type; NotRunning; BusClosed.
        """
        self._observers.emit(event)

    # --- hooks: waited for, and they may say no

    @overload
    def hook(
        self,
        pattern: str,
        fn: Callable[..., Any],
        *,
        types: Iterable[str | type[Event]] | str | type[Event] | None = None,
        order: float = 0,
    ) -> Hook[..., Any]: ...
    @overload
    def hook(
        self,
        pattern: str,
        fn: None = None,
        *,
        types: Iterable[str | type[Event]] | str | type[Event] | None = None,
        order: float = 0,
    ) -> _MakesHook: ...
    def hook(
        self,
        pattern: str,
        fn: Callable[..., Any] | None = None,
        *,
        types: Iterable[str | type[Event]] | str | type[Event] | None = None,
        order: float = 0,
    ) -> Any:
        """Have `fn` asked at points, such as `hook.before_tool_call`, `hook.publish`, `hook.*`.

        fn: plain or async, of (event) or (event, point). It returns None to go on, another event of
            the same class to go on with, or False to say no; it may raise HookRejected(reason), and
            what else it raises reaches whoever asked. Without it this is a decorator.
        types: ask it about these alone: event classes, types or patterns.
        order: lower ones are asked first; among equals, those registered first.
        `hook.publish` is asked before an event is encoded by `publish`, `publish_many` and
        `publish_soon`, and as it is collected by a transaction or a handler's effects, where nobody
        can wait for an async hook (InvalidEffect). `hook.handle` is asked in a worker, within the
        handler's attempt: no is a dead letter, `rejected`, with the reason; another event is what
        the handler sees, and what is stored stays as it is; an error is a failed attempt.
        Errors: DeclarationError.
        """
        about = (types,) if isinstance(types, str | type) else types
        patterns = None if about is None else tuple(about)
        if fn is None:
            return lambda call: self.hooks.add(pattern, call, patterns, order)
        return self.hooks.add(pattern, fn, patterns, order)

    async def intervene(self, point: str, event: E) -> E:
        """Ask the hooks of a point in turn; return the event to go on with.

        point: a name of the family `hook`, of your own making. Without hooks the event is returned.
        Errors: HookRejected at the first no; whatever a hook raises; TypeError for an answer that
        is none; DeclarationError, InvalidEvent. No Redis.
        """
        return await self.hooks.intervene(point, event)

    # --- threads

    def publish_soon(self, event: Event, **stated: Unpack[Stated]) -> "Future[Receipt]":
        """Publish from any thread, without waiting; the future has the receipt, or the error.

        stated: as of `publish`. In the order of each thread's calls, as long as no hook waits. It
        is not slowed down by a full stream: `.result()` is, so wait for it before there are too
        many. Closing the bus waits for all that were accepted.
        Errors: TypeError for what `publish` does not take; BusClosed; NotRunning, when the bus is
        in no running event loop: enter it there, or await bus.ready(). In the future:
        those of `publish`; PublishUnknown, PublishTimeout when the loop ended first.
        """
        return self._line.publish_soon(event, stated)
