"""Hooks are asked in order, may replace an event or say no, and are never passed over."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from bus import (
    Bus,
    DeclarationError,
    Event,
    HookRejected,
    InvalidEffect,
    InvalidEvent,
    event_handler,
)
from bus.agents import BeforeToolCall, hook_before_model_call, hook_before_tool_call

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

NOWHERE = "redis://localhost:1/0"  # nobody answers there: who is sent something fails
POINT = "hook.before_tool_call"


class Ordered(Event, type="hooked.ordered", key="item"):
    item: str
    price: int = 0


class Paid(Event, type="hooked.paid"):
    price: int


@pytest.fixture
async def alone() -> AsyncIterator[Bus]:
    """A bus without a server."""
    bus = Bus.connect(NOWHERE)
    yield bus
    await bus.close()


@pytest.fixture
async def bus(valkey_url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(valkey_url) as bus:
        yield bus


def asking(tool: str = "clock") -> BeforeToolCall:
    return hook_before_tool_call("run-1", call_id="c-1", tool=tool, arguments={"zone": "UTC"})


async def published(bus: Bus) -> list[dict[str, Any]]:
    return [json.loads(e.data) async for e in bus.history("hooked")]


# --- at points of one's own


async def test_without_hooks_it_is_the_event_itself(alone: Bus) -> None:
    event = asking()
    assert await alone.intervene(POINT, event) is event


async def test_hooks_replace_an_event_one_after_the_other_async_or_plain(alone: Bus) -> None:
    async def first(event: BeforeToolCall) -> BeforeToolCall:
        await asyncio.sleep(0)
        return asking(event.tool + "-1")

    def second(event: BeforeToolCall, point: str) -> BeforeToolCall:
        assert point == POINT
        return asking(event.tool + "-2")

    alone.hook(POINT, first)
    alone.hook("hook.*", second)
    alone.hook(POINT, lambda _: None)
    assert (await alone.intervene(POINT, asking())).tool == "clock-1-2"


async def test_the_order_is_that_of_registration_or_what_order_says(alone: Bus) -> None:
    asked: list[str] = []
    for name, order in (("c", 0), ("d", 0), ("e", 1.5), ("a", -2), ("b", -1), ("f", 1.5)):
        alone.hook(POINT, lambda _, name=name: asked.append(name), order=order)
    await alone.intervene(POINT, asking())
    assert asked == list("abcdef")


async def test_a_chain_of_filters_stops_at_the_first_no(alone: Bus) -> None:
    asked: list[str] = []

    def filter_named(name: str, answer: Any) -> Callable[[Event], Any]:
        def named(_: Event) -> Any:
            asked.append(name)
            return answer

        return named

    for name, answer in (("one", True), ("two", None), ("three", False), ("four", True)):
        alone.hook(POINT, filter_named(name, answer))
    with pytest.raises(HookRejected, match=r"hook\.before_tool_call: .*named said no") as raised:
        await alone.intervene(POINT, asking())
    assert asked == ["one", "two", "three"]
    assert (raised.value.reason, raised.value.point) == ("it returned False", POINT)


async def test_a_hook_says_why_it_says_no(alone: Bus) -> None:
    @alone.hook(POINT)
    async def guard(event: BeforeToolCall) -> None:
        await asyncio.sleep(0)
        if event.tool == "rm":
            raise HookRejected("not on my watch")

    assert (await alone.intervene(POINT, asking())).tool == "clock"
    with pytest.raises(HookRejected) as raised:
        await alone.intervene(POINT, asking("rm"))
    assert raised.value.reason == "not on my watch"
    assert "guard" in raised.value.hook
    assert str(raised.value).endswith("guard said no: not on my watch")
    assert str(HookRejected("why")) == "why"


async def test_a_no_that_a_hook_has_met_elsewhere_says_where(alone: Bus) -> None:
    @alone.hook("hook.before_paying")
    def refuse(_: Event) -> bool:
        return False

    @alone.hook(POINT)
    async def ask_on(_: Event) -> None:
        await alone.intervene("hook.before_paying", Paid(price=1))

    with pytest.raises(HookRejected) as raised:
        await alone.intervene(POINT, asking())
    assert raised.value.point == "hook.before_paying"
    assert "refuse" in raised.value.hook


@pytest.mark.parametrize("waits", [False, True])
async def test_what_else_a_hook_raises_reaches_the_caller_unchanged(
    alone: Bus, waits: bool
) -> None:
    class Broken(Exception):
        pass

    error = Broken("disk")

    def raises(_: Event) -> None:
        raise error

    async def raises_later(event: Event) -> None:
        await asyncio.sleep(0)
        raises(event)

    alone.hook(POINT, raises_later if waits else raises)
    asked: list[Event] = []
    alone.hook(POINT, asked.append)
    with pytest.raises(Broken) as raised:
        await alone.intervene(POINT, asking())
    assert raised.value is error
    assert asked == []


async def test_a_cancelled_caller_cancels_the_hook_it_waits_for(alone: Bus) -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    @alone.hook(POINT)
    async def slow(_: Event) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    task = asyncio.create_task(alone.intervene(POINT, asking()))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


class CheaperPaid(Paid):
    """Of the same fields, and another class."""


@pytest.mark.parametrize(
    "answer", [42, "no", 0, (), asking(), CheaperPaid(price=1), Event], ids=lambda a: repr(a)[:12]
)
async def test_an_answer_that_is_none_is_an_error(alone: Bus, answer: Any) -> None:
    alone.hook("hook.before_paying", lambda _: answer)
    with pytest.raises(TypeError, match="it returns None to go on, another Paid"):
        await alone.intervene("hook.before_paying", Paid(price=1))


async def test_types_narrow_what_a_hook_is_asked_about(alone: Bus) -> None:
    asked: list[tuple[str, str]] = []
    for types in (Paid, "hooked.*", [BeforeToolCall, "hooked.paid"], "*.before_model_call"):
        alone.hook(
            "hook.*",
            lambda event, types=str(types): asked.append((types, type(event).__name__)),
            types=types,
        )
    for event in (Paid(price=1), asking(), hook_before_model_call("r", model="m", prompt="p")):
        await alone.intervene("hook.step", event)
    assert [name for _, name in asked] == ["Paid"] * 3 + ["BeforeToolCall", "BeforeModelCall"]


async def test_a_decorator_returns_the_hook_which_is_the_function_still(alone: Bus) -> None:
    @alone.hook(POINT, order=3)
    def refuse(event: Event) -> bool:
        return not event

    assert refuse(asking()) is False
    assert (refuse.pattern, refuse.types, refuse.order) == (POINT, None, 3)
    assert "refuse at hook.before_tool_call" in repr(refuse)
    with pytest.raises(HookRejected):
        await alone.intervene(POINT, asking())
    refuse.close()
    refuse.close()
    assert await alone.intervene(POINT, asking())


@pytest.mark.parametrize(
    ("pattern", "fn", "settings", "match"),
    [
        ("hooked.ordered", print, {}, r"'hooked\.ordered' names none.*types= says"),
        ("hook. before", print, {}, "type pattern"),
        (POINT, 5, {}, "a hook is a function of an event, not 5"),
        (POINT, lambda: None, {}, r"takes \(event\) or \(event, point\)"),
        (POINT, print, {"types": "bad type"}, "type pattern"),
        (POINT, print, {"order": "first"}, "order is a number, not 'first'"),
        (POINT, print, {"order": float("nan")}, "order is a number, not nan"),
    ],
)
async def test_what_is_no_hook_is_refused(
    alone: Bus, pattern: Any, fn: Any, settings: Any, match: str
) -> None:
    with pytest.raises(DeclarationError, match=match):
        alone.hook(pattern, fn, **settings)


@pytest.mark.parametrize(
    ("point", "event", "error", "match"),
    [
        ("agent.before", asking(), DeclarationError, "of the family 'hook'.*not 'agent.before'"),
        ("hook", asking(), DeclarationError, "is not a dotted name"),
        ("hook.*", asking(), DeclarationError, "is not a dotted name"),
        (POINT, {"tool": "rm"}, InvalidEvent, "hooks are asked about events, not dict"),
    ],
)
async def test_what_is_no_question_is_refused(
    alone: Bus, point: Any, event: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        await alone.intervene(point, event)


# --- a question is asked, and never published


async def test_a_question_is_never_published(bus: Bus) -> None:
    for publishing in (bus.publish(asking()), bus.publish_many([asking()])):
        with pytest.raises(InvalidEvent, match=r"is a question.*bus\.intervene"):
            await publishing
    async with bus.transaction() as change:
        with pytest.raises(InvalidEvent, match="is a question"):
            change.publish(asking())
    for what in (BeforeToolCall, "hook.*"):
        with pytest.raises(DeclarationError, match=r"never published: use bus\.hook"):
            event_handler(what, group="g")


# --- hook.publish


async def test_hook_publish_is_asked_before_anything_is_encoded_or_sent(alone: Bus) -> None:
    """The bus has no server, and the event could not be encoded."""

    @alone.hook("hook.publish")
    async def refuse(event: Event) -> bool:
        return False

    bad = Ordered(item="i", price="a lot")  # type: ignore[arg-type]
    for publishing in (alone.publish(bad), alone.publish_many([bad])):
        with pytest.raises(HookRejected):
            await publishing


async def test_hook_publish_may_replace_what_is_published(bus: Bus) -> None:
    @bus.hook("hook.publish", types=Ordered)
    def round_up(event: Ordered) -> Ordered | None:
        return None if event.price % 10 == 0 else Ordered(item=event.item, price=100)

    await bus.publish(Ordered(item="a", price=7))
    await bus.publish(Paid(price=7))
    await bus.publish_many([Ordered(item="b", price=3), Ordered(item="c", price=20)])
    await asyncio.wrap_future(bus.publish_soon(Ordered(item="d", price=1)))
    async with bus.transaction() as change:
        change.publish(Ordered(item="e", price=2))
    round_up.close()
    await bus.publish(Ordered(item="f", price=7))
    assert await published(bus) == [
        {"item": "a", "price": 100},
        {"price": 7},
        {"item": "b", "price": 100},
        {"item": "c", "price": 20},
        {"item": "d", "price": 100},
        {"item": "e", "price": 100},
        {"item": "f", "price": 7},
    ]


async def test_of_many_none_is_published_if_one_is_refused(bus: Bus) -> None:
    bus.hook("hook.publish", lambda event: event.price < 10)
    with pytest.raises(HookRejected):
        await bus.publish_many([Paid(price=1), Paid(price=99), Paid(price=2)])
    await bus.publish(Paid(price=3))
    assert await published(bus) == [{"price": 3}]


async def test_what_a_transaction_collects_is_asked_about_by_plain_hooks(bus: Bus) -> None:
    cheap = bus.hook("hook.publish", lambda event: event.price < 10)
    async with bus.transaction() as change:
        with pytest.raises(HookRejected):
            change.publish(Paid(price=99))
        change.publish(Paid(price=1))

    @bus.hook("hook.publish", types=Ordered)
    async def ask_around(event: Ordered) -> None: ...

    async with bus.transaction() as change:
        with pytest.raises(InvalidEffect, match=r"ask_around.* is async, and .*plain function"):
            change.publish(Ordered(item="a"))
        change.publish(Paid(price=2))
    cheap.close()
    assert await published(bus) == [{"price": 1}, {"price": 2}]


async def test_an_error_of_a_hook_is_the_publishers(bus: Bus) -> None:
    def broken(_: Event) -> None:
        raise ZeroDivisionError

    hook = bus.hook("hook.publish", broken)
    with pytest.raises(ZeroDivisionError):
        await bus.publish(Paid(price=1))
    hook.close()
    assert await bus.publish(Paid(price=2))
    assert await published(bus) == [{"price": 2}]


async def test_observers_are_told_what_was_published_not_what_was_asked(bus: Bus) -> None:
    bus.hook("hook.publish", lambda event: Paid(price=event.price + 1))
    async with bus.observed("hooked.*") as events:
        await bus.publish(Paid(price=1))
        await bus.publish(Paid(price=5))
        assert [await anext(events), await anext(events)] == [Paid(price=2), Paid(price=6)]
