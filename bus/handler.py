"""Handlers: what runs for which events, and how its failures are treated."""

import importlib
import inspect
import pkgutil
import traceback
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, Literal, ParamSpec, Protocol, overload

from bus.backoff import Backoff
from bus.breaker import Breaker
from bus.config import (
    BATCH_MOST,
    BATCH_WAIT_MOST_MS,
    BATCH_WAIT_MS,
    CONCURRENCY,
    MAX_ATTEMPTS,
    MAXLEN_MAX,
    ONCE_LEAST,
    ONCE_MOST,
    VISIBILITY_S,
    checked_name,
    checked_number,
)
from bus.delivery import DeadLettered
from bus.errors import DeclarationError, NotSupported
from bus.event import QUESTIONS, Event, pattern_of, type_matches
from bus.signature import checked_signature
from bus.topic import Topic, topics_of

P = ParamSpec("P")
Start = Literal["beginning", "now"]
OnDead = Callable[[DeadLettered, Any], Awaitable[None]]
BREAKER = Breaker()  # on by default: an outage costs no event


@dataclass(frozen=True, slots=True, eq=False)
class Handler(Generic[P]):
    """One handler and its settings; made by `event_handler`, collected by `Registry`.

    call: the async function, or the bound `handle` of an instance of the class.
    takes_delivery: whether it is called with (event, delivery) or with the event alone.
    batch: None if it takes one event at a time, else the most deliveries in the list it takes.
    patterns: the types it asked for, exact names and patterns.
    The other fields are the parameters of `event_handler`.
    """

    call: Callable[P, Awaitable[Any]]
    patterns: tuple[str, ...]
    group: str
    takes_delivery: bool
    topics: tuple[str, ...] = ()
    concurrency: int = CONCURRENCY
    max_attempts: int = MAX_ATTEMPTS
    backoff: Backoff = field(default_factory=Backoff)
    timeout_s: float | None = None
    visibility_s: float = VISIBILITY_S
    start: Start = "beginning"
    on_dead: OnDead | None = None
    dead_letter_maxlen: int | None = None
    breaker: Breaker | None = BREAKER
    batch: int | None = None
    batch_wait_ms: int = BATCH_WAIT_MS
    once: timedelta | None = None
    name: str = ""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Awaitable[Any]:
        """Call the function or `handle` as it is: a handler is an ordinary callable in tests."""
        return self.call(*args, **kwargs)

    def wants(self, type: str) -> bool:
        """Return whether the handler asked for events of `type`."""
        return any(type_matches(p, type) for p in self.patterns)

    def reads(self) -> tuple[str, ...]:
        """Return the names of the topics it reads, sorted. Errors: DeclarationError if none."""
        return topics_of(self.patterns, self.topics)


class _Decorator(Protocol):
    @overload
    def __call__(self, target: Callable[P, Awaitable[Any]], /) -> Handler[P]: ...
    @overload
    def __call__(self, target: type, /) -> Handler[...]: ...


def event_handler(
    *what: type[Event] | str,
    group: str,
    topics: Iterable[str] = (),
    concurrency: int = CONCURRENCY,
    max_attempts: int = MAX_ATTEMPTS,
    backoff: Backoff | None = None,
    timeout_s: float | None = None,
    visibility_s: float = VISIBILITY_S,
    start: Start = "beginning",
    on_dead: OnDead | None = None,
    dead_letter_maxlen: int | None = None,
    breaker: Breaker | None = BREAKER,
    batch: int | None = None,
    batch_wait_ms: int | None = None,
    once: timedelta | None = None,
    ordered: bool = False,
) -> _Decorator:
    """Make a `Handler` of an async function, or of a class with an async `handle`.

    what: event classes, type names or type patterns (`document.*`); at least one.
    group: name of its consumer group; it keeps the place in the streams, so it must not change.
    topics: where to look besides the topics of the known classes that match.
    concurrency: how many run at a time in one worker process.
    max_attempts: failures and crashes together; then the dead letters.
    backoff: the wait between attempts.
    timeout_s: one attempt's limit in seconds; None for none. Too late is a failure.
    visibility_s: a delivery not renewed for this long may be taken by another worker, in seconds.
    start: where a new group begins, "beginning" (everything kept) or "now".
    on_dead: `await on_dead(dead_lettered, bus)` just before the dead-letter script; its error is
        logged and the dead letter goes ahead. A crash repeats it.
    dead_letter_maxlen: most dead letters per partition, None for any number. When they are full,
        what would die is parked, again and again, until some are taken out; nothing is dropped.
    breaker: when most calls fail, events wait instead of using up attempts; None switches it off.
    batch: makes it a batch handler, `async def count(deliveries: list[Delivery[E]])`, called with
        1 to `batch` deliveries, at most 5,000. Returning acks all of them but those that it settled
        singly (`delivery.fail`, `.reject`, `.retry_later`): one that it forgot is acked, too.
        Raising fails all but those. `timeout_s` and `concurrency` are those of the calls.
    batch_wait_ms: how long a call waits to be fuller, from the receipt of the oldest that waits;
        0 to 10,000, 50 if not said. A retry waits for company as any other; an entry that may have
        killed its worker goes alone.
    once: for so long after an event was handled, another entry with its event id is acked
        unhandled; two are never handled at a time. See docs/guarantees.md for what it covers.
    ordered: not part of this release.
    Errors: DeclarationError, NotSupported. Nothing is registered globally.
    """
    if ordered:
        raise NotSupported(f"handler {group}: ordered is not part of this release")
    checked_name(group, "group name")
    _check_batch(batch, batch_wait_ms, group)
    checked_number(concurrency, f"handler {group}: concurrency", 1, 10_000, whole=True)
    checked_number(max_attempts, f"handler {group}: max_attempts", 1, 1_000_000, whole=True)
    checked_number(visibility_s, f"handler {group}: visibility_s", 0.3, 86_400)
    if timeout_s is not None:
        checked_number(timeout_s, f"handler {group}: timeout_s", 0.001, 86_400 * 7)
    if dead_letter_maxlen is not None:
        limited = f"handler {group}: dead_letter_maxlen"
        checked_number(dead_letter_maxlen, limited, 1, MAXLEN_MAX, whole=True)
    if start not in ("beginning", "now"):
        raise DeclarationError(f"handler {group}: start is 'beginning' or 'now', not {start!r}")
    _check_policies(backoff, breaker, group)
    if once is not None:
        _check_once(once, group)
    if on_dead is not None:
        _check_on_dead(on_dead, group)
    if isinstance(topics, str):
        raise DeclarationError(f"handler {group}: topics is a list of names, not one string")
    patterns = tuple(_pattern(w, group) for w in what)
    if not patterns:
        raise DeclarationError(f"handler {group}: say which events, classes or type patterns")
    names = tuple(checked_name(t, "topic name") for t in topics)

    def decorate(target: Any) -> Handler[Any]:
        call, name = _callable_of(target, group)
        asked = [w for w in what if isinstance(w, type)]
        takes_delivery = checked_signature(call, asked, group, batch=batch is not None)
        return Handler(
            call=call,
            patterns=patterns,
            group=group,
            takes_delivery=takes_delivery,
            topics=names,
            concurrency=concurrency,
            max_attempts=max_attempts,
            backoff=backoff or Backoff(),
            timeout_s=timeout_s,
            visibility_s=visibility_s,
            start=start,
            on_dead=on_dead,
            dead_letter_maxlen=dead_letter_maxlen,
            breaker=breaker,
            batch=batch,
            batch_wait_ms=BATCH_WAIT_MS if batch_wait_ms is None else batch_wait_ms,
            once=once,
            name=name,
        )

    return decorate


def _pattern(what: type[Event] | str, group: str) -> str:
    if not isinstance(what, str) and not (isinstance(what, type) and issubclass(what, Event)):
        raise DeclarationError(
            f"handler {group}: {what!r} is no event class and no type pattern;"
            " use @event_handler(DocumentCreated, group=...)"
        )
    pattern = pattern_of(what)
    if pattern.partition(".")[0] == QUESTIONS:
        raise DeclarationError(
            f"handler {group}: {pattern} is asked at a hook, and never published: use bus.hook"
        )
    return pattern


def _callable_of(target: Any, group: str) -> tuple[Callable[..., Awaitable[Any]], str]:
    name = getattr(target, "__qualname__", repr(target))
    if isinstance(target, type):
        try:
            instance = target()
        except TypeError as error:
            raise DeclarationError(
                f"handler {group}: class {name} must be constructible without arguments ({error})"
            ) from error
        target = getattr(instance, "handle", None)
        if target is None:
            raise DeclarationError(f"handler {group}: class {name} has no method `handle`")
    if not callable(target):
        raise DeclarationError(f"handler {group}: {name} cannot be called")
    if not inspect.iscoroutinefunction(target) and not inspect.iscoroutinefunction(
        getattr(target, "__call__", None)  # noqa: B004 - an object whose __call__ is async
    ):
        raise DeclarationError(
            f"handler {group}: {name} must be `async def`; run blocking code with"
            " asyncio.to_thread inside it"
        )
    return target, name


def _check_policies(backoff: object, breaker: object, group: str) -> None:
    if backoff is not None and not isinstance(backoff, Backoff):
        raise DeclarationError(f"handler {group}: backoff is a Backoff(...), not {backoff!r}")
    if breaker is not None and not isinstance(breaker, Breaker):
        raise DeclarationError(
            f"handler {group}: breaker is a Breaker(...), or None for none, not {breaker!r}"
        )


def _check_batch(batch: int | None, wait_ms: int | None, group: str) -> None:
    if batch is not None:
        checked_number(batch, f"handler {group}: batch", 1, BATCH_MOST, whole=True)
    elif wait_ms is not None:
        raise DeclarationError(
            f"handler {group}: batch_wait_ms goes with batch=, the most per call"
        )
    if wait_ms is not None:
        waits = f"handler {group}: batch_wait_ms"
        checked_number(wait_ms, waits, 0, BATCH_WAIT_MOST_MS, whole=True)


def _check_once(once: object, group: str) -> None:
    if not isinstance(once, timedelta) or not ONCE_LEAST <= once <= ONCE_MOST:
        raise DeclarationError(
            f"handler {group}: once is a timedelta of {ONCE_LEAST.total_seconds():g} s to"
            f" {ONCE_MOST.days} days, how long an event is remembered, not {once!r}"
        )


def _check_on_dead(on_dead: OnDead, group: str) -> None:
    if not inspect.iscoroutinefunction(on_dead):
        raise DeclarationError(f"handler {group}: on_dead must be an async function")
    try:
        inspect.signature(on_dead).bind(None, None)
    except TypeError:
        raise DeclarationError(
            f"handler {group}: on_dead takes (dead_lettered, bus), not {inspect.signature(on_dead)}"
        ) from None


class Registry:
    """The handlers, topics and lifespan of one program."""

    def __init__(
        self,
        handlers: Iterable[Handler[...] | type] = (),
        topics: Iterable[Topic] = (),
        lifespan: Callable[..., Any] | None = None,
    ) -> None:
        # Type checkers take a decorated class for a class still, hence `type` in the signature.
        self.topics: tuple[Topic, ...] = tuple(topics)
        self.lifespan = lifespan
        by_group: dict[str, Handler[...]] = {}
        for handler in handlers:
            if not isinstance(handler, Handler):
                raise DeclarationError(
                    f"{handler!r} is no handler: decorate it with @event_handler(...)"
                )
            other = by_group.setdefault(handler.group, handler)
            if other is not handler:
                raise DeclarationError(
                    f"two handlers have the group {handler.group!r}: {other.name} and"
                    f" {handler.name}; each handler needs a group of its own"
                )
        # By group: a handler that was named twice runs once.
        self.handlers: tuple[Handler[...], ...] = tuple(by_group.values())

    @classmethod
    def collect(cls, package: str) -> "Registry":
        """Import `package` and its submodules; gather handlers, topics and `lifespan`.

        Errors: DeclarationError naming the module that could not be imported and why, or that
        there is no handler at all.
        """
        modules = imported(package)
        values = [value for module in modules for value in vars(module).values()]
        handlers = {id(value): value for value in values if isinstance(value, Handler)}
        if not handlers:
            raise DeclarationError(
                f"{package!r} holds no handlers: decorate functions with @event_handler(...)"
            )
        lifespan = getattr(modules[0], "lifespan", None)
        return cls(handlers.values(), declared_topics(modules), lifespan)


def declared_topics(modules: Iterable[Any]) -> list[Topic]:
    """Return the topics that stand in modules. Errors: DeclarationError when two differ."""
    topics: dict[str, Topic] = {}
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, Topic) and topics.setdefault(value.name, value) != value:
                raise DeclarationError(
                    f"topic {value.name} is declared twice, differently ({module.__name__})"
                )
    return list(topics.values())


def imported(package: str) -> list[Any]:
    """Import `package` and its submodules, and return them. Errors: DeclarationError."""
    if not isinstance(package, str) or not all(s.isidentifier() for s in package.split(".")):
        raise DeclarationError(f"{package!r} is not the name of a Python package or module")

    def load(name: str) -> Any:
        try:
            return importlib.import_module(name)
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = str(Path(__file__).parent)
            users = [
                f
                for f in frames
                if "importlib" not in f.filename and not f.filename.startswith(own)
            ]
            where = f" ({users[-1].filename}:{users[-1].lineno})" if users else ""
            raise DeclarationError(
                f"cannot import {name!r}: {type(error).__name__}: {error}{where}"
            ) from error

    root = load(package)
    path = getattr(root, "__path__", None)
    if path is None:
        return [root]
    found = [m.name for m in pkgutil.walk_packages(path, package + ".", onerror=load)]
    return [root, *(load(n) for n in found if not n.endswith("__main__"))]
