"""Hooks: asked before something is done, awaited in order; they may replace an event, or say no.

    event = await bus.intervene("hook.before_tool_call", event)

A *point* is a name of the family `hook` at which a program asks. A hook names points by pattern and
is called with the event, or with (event, point). What it answers decides:

| answer | what it means |
|---|---|
| None, True | go on with the event as it is |
| an event of the same class | go on with that one instead |
| False | no: HookRejected; a filter is a hook that answers True or False |
| raises HookRejected(reason) | no, for that reason |
| raises anything else | that error reaches whoever asked, unchanged |

The first no ends the chain. Two points are built in: `hook.publish`, asked before an event is
encoded, and `hook.handle`, asked in a worker before a handler runs. A hook that is there to say no
must not be forgotten, so nothing about it is caught, timed out or logged and passed over here.
"""

import math
from collections.abc import Awaitable, Callable
from inspect import isawaitable, iscoroutine
from itertools import count
from typing import Any, Generic, ParamSpec, TypeVar

from bus.errors import DeclarationError, HookRejected, InvalidEffect, InvalidEvent
from bus.event import QUESTIONS, Event, checked_type, info_of, pattern_of, type_matches
from bus.signature import needs_two

P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E", bound=Event)

PUBLISH, HANDLE = f"{QUESTIONS}.publish", f"{QUESTIONS}.handle"
_REMEMBERED = 10_000  # chains; raw events have classes of their own


class Hook(Generic[P, R]):
    """One hook; made by `bus.hook`. Calling it calls its function, as in a test.

    pattern: the points it is asked at. types: the event types it is asked about, None for all.
    order: hooks of a lower one are asked first; among equals, those registered first.
    """

    def __init__(
        self,
        hooks: "Hooks",
        pattern: str,
        call: Callable[P, R],
        types: tuple[str, ...] | None,
        order: float,
    ) -> None:
        self.name = getattr(call, "__qualname__", repr(call))
        self.pattern = pattern
        self.types = types
        self.order = order
        self.takes_point = needs_two(call, f"hook {self.name}", "point")
        self._call = call
        self._hooks = hooks

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function as it is."""
        return self._call(*args, **kwargs)

    def close(self) -> None:
        """Ask it no more; what is being asked goes on. A second time does nothing."""
        self._hooks.remove(self)

    def wants(self, point: str, type: str) -> bool:
        """Return whether it is asked at `point` about events of `type`."""
        about = self.types is None or any(type_matches(t, type) for t in self.types)
        return about and type_matches(self.pattern, point)

    def ask(self, point: str, event: Event) -> Any:
        """Return what the function answers, or what that is to be awaited from.

        Errors: whatever it raises.
        """
        call: Callable[..., Any] = self._call
        try:
            return call(event, point) if self.takes_point else call(event)
        except HookRejected as no:
            self._sign(no, point)
            raise

    async def awaited(self, answer: Awaitable[Any], point: str) -> Any:
        """Return what an async function answers. Errors: whatever it raises."""
        try:
            return await answer
        except HookRejected as no:
            self._sign(no, point)
            raise

    def outcome(self, answer: Any, event: E, point: str) -> E:
        """Return the event to go on with. Errors: HookRejected; TypeError for no such answer."""
        if answer is None or answer is True:
            return event
        if answer.__class__ is event.__class__:
            return answer
        if answer is False:
            no = HookRejected("it returned False")
            self._sign(no, point)
            raise no
        raise TypeError(
            f"hook {self.name} at {point} answered {answer!r:.100}: it returns None to go on,"
            f" another {type(event).__name__} to go on with, or False to say no"
        )

    def _sign(self, no: HookRejected, point: str) -> None:
        """Say in a refusal whose it is, unless the hook has met it somewhere else."""
        if not no.point:
            no.point, no.hook = point, self.name

    def __repr__(self) -> str:
        return f"<Hook {self.name} at {self.pattern}>"


class Hooks:
    """The hooks of one bus.

    changed: called when one has come or gone, so that nobody has to look before each event.
    """

    def __init__(self) -> None:
        self.changed: list[Callable[[], None]] = []
        self._hooks: list[tuple[float, int, Hook[..., Any]]] = []
        self._numbers = count()
        self._chains: dict[tuple[str, type], tuple[Hook[..., Any], ...]] = {}

    def add(
        self,
        pattern: str,
        call: Callable[P, R],
        types: "tuple[str | type[Event], ...] | None" = None,
        order: float = 0,
    ) -> Hook[P, R]:
        """Register a hook. Errors: DeclarationError."""
        if pattern_of(pattern).partition(".")[0] not in (QUESTIONS, "*"):
            raise DeclarationError(
                f"a hook is asked at points, such as {PUBLISH!r} or {QUESTIONS}.*, and {pattern!r}"
                " names none: which events it is asked about, types= says"
            )
        if not callable(call):
            raise DeclarationError(f"a hook is a function of an event, not {call!r}")
        if not isinstance(order, int | float) or math.isnan(order):
            raise DeclarationError(f"order is a number, not {order!r}")
        patterns = None if types is None else tuple(pattern_of(t) for t in types)
        hook = Hook(self, pattern, call, patterns, order)
        self._hooks.append((order, next(self._numbers), hook))
        self._hooks.sort(key=lambda entry: entry[:2])
        self._has_changed()
        return hook

    def remove(self, hook: Hook[..., Any]) -> None:
        """Forget a hook; one that is not there is no error."""
        self._hooks = [entry for entry in self._hooks if entry[2] is not hook]
        self._has_changed()

    def _has_changed(self) -> None:
        self._chains.clear()
        for tell in self.changed:
            tell()

    def serve(self, point: str) -> bool:
        """Return whether there is any hook at `point`."""
        return any(type_matches(hook.pattern, point) for _, _, hook in self._hooks)

    async def intervene(self, point: str, event: E) -> E:
        """Ask the hooks of `point` in turn. See `Bus.intervene`."""
        for hook in self._chain(point, event):
            answer = hook.ask(point, event)
            if answer is not None and isawaitable(answer):
                answer = await hook.awaited(answer, point)
            event = hook.outcome(answer, event, point)
        return event

    def intervene_now(self, point: str, event: E) -> E:
        """Ask as `intervene`, where nobody can wait. Errors: InvalidEffect for an async hook."""
        for hook in self._chain(point, event):
            answer = hook.ask(point, event)
            if answer is not None and isawaitable(answer):
                if iscoroutine(answer):
                    answer.close()
                raise InvalidEffect(
                    f"hook {hook.name} at {point} is async, and an event that is collected among"
                    " effects cannot wait for it: make it a plain function, or narrow its types="
                )
            event = hook.outcome(answer, event, point)
        return event

    def _chain(self, point: str, event: Event) -> tuple[Hook[..., Any], ...]:
        chain = self._chains.get((point, event.__class__))
        if chain is None:
            if not isinstance(event, Event):
                raise InvalidEvent(f"hooks are asked about events, not {type(event).__name__}")
            if checked_type(point, "point").partition(".")[0] != QUESTIONS:
                raise DeclarationError(
                    f"a point is of the family {QUESTIONS!r}, such as"
                    f" '{QUESTIONS}.before_tool_call', not {point!r}"
                )
            type_ = info_of(event.__class__).type
            chain = tuple(hook for _, _, hook in self._hooks if hook.wants(point, type_))
            if len(self._chains) > _REMEMBERED:
                self._chains.clear()
            self._chains[point, event.__class__] = chain
        return chain
