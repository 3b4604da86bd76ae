"""Every outcome of a handler and its verdict, without any server."""

from __future__ import annotations

import asyncio
import time
from contextvars import ContextVar
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from bus import Backoff, Event, Reject, RetryLater, event_handler
from bus.config import UNKNOWN_TYPE_MAX_AGE_S, UNKNOWN_TYPE_PARK_S
from bus.delivery import (
    ACK,
    HAND_BACK,
    SKIP,
    DeadLetter,
    DeadLettered,
    Delivery,
    Failure,
    Origin,
    Park,
    Verdict,
    current_delivery,
)
from bus.streams.codec import envelope_of
from bus.worker.executor import Executor, Slot, SlotTask, Suspended, absorb_cancellation, failure_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

ORIGIN = Origin("g", "bus:{exec:0}", "bus:{exec:0}", SimpleNamespace(), envelope_of)  # type: ignore[arg-type]
STEADY = Backoff(base_s=2.0, factor=3.0, jitter=0.0)


class Done(Event, type="exec.done"):
    n: int = 1


class Second(Event, type="exec.second", version=2):
    n: int


class Disaster(BaseException):
    """No Exception: what `except Exception` does not see."""


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("even its text fails")


class WrongText(Exception):
    def __str__(self) -> str:
        return 42  # type: ignore[return-value]  # noqa: PLE0307 - the fault under test


class DeadlyText(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


def delivery(attempt: int = 1, entry_id: str | None = None, **fields: bytes) -> Delivery[Any]:
    entry = {"id": b"e-1", "type": b"exec.done", "data": b'{"n":1}', **fields}
    flat = [x for name, value in entry.items() for x in (name.encode(), value)]
    entry_id = entry_id or f"{int(time.time() * 1000)}-0"
    return Delivery(ORIGIN, entry_id.encode(), flat, attempt, 0.0)


def executor(call: Callable[..., Awaitable[Any]], **settings: Any) -> Executor:
    settings = {"group": "g", "backoff": STEADY, "max_attempts": 3, **settings}
    return Executor(event_handler(Done, Second, **settings)(call))


class Run:
    """One call in a slot of its own, as a consumer makes it."""

    def __init__(self, call: Callable[..., Awaitable[Any]], attempt: int = 1, **settings: Any):
        self.executor = executor(call, **settings)
        self.delivery = delivery(attempt)
        self.slot = Slot()
        self.verdict: Verdict | None = None

    async def call(self) -> Verdict:
        ended = self.executor.begin(self.slot, self.delivery)
        if isinstance(ended, Suspended):
            ended = await self.executor.finish(self.slot, self.delivery, ended)
        return ended

    async def _body(self) -> None:
        assert self.executor.triage(self.delivery) is None
        self.slot.delivery = self.delivery
        self.slot.started_at = asyncio.get_running_loop().time()
        self.verdict = await self.call()
        self.slot.started_at = 0.0
        assert self.slot.task is not None
        if self.slot.task.cancelling():
            await absorb_cancellation(self.slot.task)

    def start(self) -> asyncio.Task[None]:
        loop = asyncio.get_running_loop()
        self.slot.task = SlotTask(self._body(), loop=loop)
        return self.slot.task

    async def end(self) -> Verdict | None:
        await self.start()
        return self.verdict


def raising(error: BaseException, *, suspend: bool) -> Callable[..., Awaitable[None]]:
    async def handler(event: Done) -> None:
        if suspend:
            await asyncio.sleep(0)
        raise error

    return handler


both_ways = pytest.mark.parametrize("suspend", [False, True], ids=["at once", "after an await"])


# --- what a handler returns and raises


@both_ways
async def test_returning_is_an_ack(suspend: bool) -> None:
    async def handler(event: Done) -> str:
        if suspend:
            await asyncio.sleep(0)
        return "whatever it returns means nothing"

    assert await Run(handler).end() is ACK


@both_ways
@pytest.mark.parametrize(
    "error",
    [
        ValueError("why"),
        TimeoutError("its own"),
        SystemExit("why"),
        KeyboardInterrupt("why"),
        GeneratorExit("why"),
        Disaster("why"),
        StopAsyncIteration("why"),
        BaseExceptionGroup("why", [Disaster()]),
    ],
    ids=lambda e: type(e).__name__,
)
async def test_whatever_is_raised_parks_until_the_next_attempt(
    error: BaseException, suspend: bool
) -> None:
    verdict = await Run(raising(error, suspend=suspend)).end()
    assert isinstance(verdict, Park)
    assert verdict.delay_s == 2.0
    assert verdict.error is not None
    assert verdict.error.type in (type(error).__name__, "RuntimeError")
    assert "raising" in verdict.error.where or "handler" in verdict.error.where


@both_ways
async def test_the_last_attempt_dead_letters(suspend: bool) -> None:
    verdict = await Run(raising(Disaster("why"), suspend=suspend), attempt=3).end()
    assert isinstance(verdict, DeadLetter)
    assert (verdict.reason, verdict.error.type, verdict.error.text) == ("failed", "Disaster", "why")


async def test_the_delay_grows_by_attempt() -> None:
    verdict = await Run(raising(ValueError(), suspend=False), attempt=2).end()
    assert isinstance(verdict, Park)
    assert verdict.delay_s == 6.0


@both_ways
async def test_reject_dead_letters_at_once(suspend: bool) -> None:
    verdict = await Run(raising(Reject("too old"), suspend=suspend)).end()
    assert isinstance(verdict, DeadLetter)
    assert (verdict.reason, verdict.error.text) == ("rejected", "too old")


@pytest.mark.parametrize("reason", [404, None, ValueError("inner"), b"bytes"])
async def test_a_reason_that_is_no_text_is_still_a_reason(reason: Any) -> None:
    verdict = await Run(raising(Reject(reason), suspend=False)).end()
    assert isinstance(verdict, DeadLetter)
    assert (verdict.reason, verdict.error.text) == ("rejected", str(reason))


@both_ways
async def test_retry_later_uses_up_no_attempt(suspend: bool) -> None:
    verdict = await Run(raising(RetryLater(7), suspend=suspend), attempt=3).end()
    assert isinstance(verdict, Park)
    assert (verdict.delay_s, verdict.error) == (7, None)


@pytest.mark.parametrize("delay_s", [-1, float("nan"), float("inf"), 1e12])
def test_retry_later_refuses_a_wait_that_is_none(delay_s: float) -> None:
    with pytest.raises(ValueError, match="RetryLater takes"):
        RetryLater(delay_s)


@pytest.mark.parametrize("kind", [Mute, WrongText, DeadlyText])
async def test_an_error_without_a_text_is_an_error_all_the_same(kind: type[Exception]) -> None:
    verdict = await Run(raising(kind(), suspend=True)).end()
    assert isinstance(verdict, Park)
    assert verdict.error is not None
    assert verdict.error.type == kind.__name__


async def test_texts_and_tracebacks_are_bounded_and_always_text() -> None:
    def deep(n: int) -> None:
        if n:
            deep(n - 1)
        raise ValueError("\ud800" + "é" * 1_000_000)

    with pytest.raises(ValueError) as caught:  # noqa: PT011
        deep(300)
    failure = failure_of(caught.value)
    assert len(failure.text.encode()) <= 2_000
    assert len(failure.traceback.encode()) <= 8_000
    assert failure.where.endswith("deep")


# --- cancellation


@both_ways
async def test_raising_cancelled_error_by_hand_is_a_failure(suspend: bool) -> None:
    verdict = await Run(raising(asyncio.CancelledError(), suspend=suspend)).end()
    assert isinstance(verdict, Park)
    assert verdict.error == Failure(
        "CancelledError",
        "the handler cancelled itself",
        verdict.error.where,
        verdict.error.traceback,
    )


async def test_cancelling_the_own_task_is_a_failure_and_the_slot_lives_on() -> None:
    async def handler(event: Done) -> None:
        asyncio.current_task().cancel()  # type: ignore[union-attr]
        await asyncio.sleep(0)

    run = Run(handler)
    verdict = await run.end()
    assert isinstance(verdict, Park)
    assert verdict.error is not None
    assert verdict.error.text == "the handler cancelled itself"
    assert run.slot.task is not None
    assert not run.slot.task.cancelled()


async def test_cancelling_the_own_task_and_returning_is_an_ack() -> None:
    async def handler(event: Done) -> None:
        asyncio.current_task().cancel()  # type: ignore[union-attr]

    run = Run(handler)
    assert await run.end() is ACK
    assert run.slot.task is not None
    assert not run.slot.task.cancelled()


async def test_a_cancellation_for_time_is_a_failure() -> None:
    async def handler(event: Done) -> None:
        await asyncio.Event().wait()

    run = Run(handler, timeout_s=1.5)
    task = run.start()
    await asyncio.sleep(0)
    run.slot.cancel("timeout", asyncio.get_running_loop().time())
    await task
    assert isinstance(run.verdict, Park)
    text = "ran longer than timeout_s = 1.5"
    assert run.verdict.error == Failure("TimeoutError", text, where=text), "told from a socket's"


async def test_a_cancellation_for_shutdown_hands_back() -> None:
    async def handler(event: Done) -> None:
        await asyncio.Event().wait()

    run = Run(handler, attempt=3)
    task = run.start()
    await asyncio.sleep(0)
    run.slot.cancel("shutdown", asyncio.get_running_loop().time())
    await task
    assert run.verdict is HAND_BACK


async def test_a_slot_without_a_call_is_not_cancelled() -> None:
    async def wait() -> str:
        await asyncio.sleep(0)
        return "undisturbed"

    slot = Slot()
    slot.task = SlotTask(wait(), loop=asyncio.get_running_loop())  # type: ignore[arg-type]
    slot.cancel("timeout", 1.0)
    assert await slot.task == "undisturbed"  # type: ignore[func-returns-value]


# --- what a handler does with asyncio stays in its slot


async def test_a_timeout_inside_a_handler_is_the_handlers_own() -> None:
    async def handler(event: Done) -> None:
        try:
            async with asyncio.timeout(0.001):
                await asyncio.Event().wait()
        except TimeoutError:
            return

    bystander = asyncio.create_task(asyncio.sleep(0.01, "undisturbed"))
    run = Run(handler)
    assert await run.end() is ACK
    assert run.slot.task is not None
    assert run.slot.task.cancelling() == 0
    assert await bystander == "undisturbed"


async def test_a_timeout_that_leaves_the_handler_is_a_failure() -> None:
    async def handler(event: Done) -> None:
        async with asyncio.timeout(0.001):
            await asyncio.Event().wait()

    verdict = await Run(handler).end()
    assert isinstance(verdict, Park)
    assert verdict.error is not None
    assert verdict.error.type == "TimeoutError"


async def test_a_task_group_inside_a_handler_is_the_handlers_own() -> None:
    async def fail() -> None:
        raise ValueError("one of the children")

    async def handler(event: Done) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            group.create_task(asyncio.Event().wait())

    run = Run(handler)
    verdict = await run.end()
    assert isinstance(verdict, Park)
    assert verdict.error is not None
    assert verdict.error.type == "ExceptionGroup"
    assert run.slot.task is not None
    assert run.slot.task.cancelling() == 0


async def test_context_variables_do_not_leak_from_call_to_call() -> None:
    colour: ContextVar[str] = ContextVar("colour", default="none")
    seen: list[str] = []

    async def handler(event: Done) -> None:
        seen.append(colour.get())
        colour.set("red")
        await asyncio.sleep(0)
        seen.append(colour.get())

    async def twice() -> None:
        for _ in range(2):
            await run.call()
        seen.append(colour.get())

    run = Run(handler)
    run.executor.triage(run.delivery)
    await SlotTask(twice(), loop=asyncio.get_running_loop())
    assert seen == ["none", "red", "none", "red", "none"]


async def test_a_handler_and_its_tasks_know_their_delivery() -> None:
    seen: list[Any] = []

    async def child() -> None:
        seen.append(current_delivery.get())

    async def handler(event: Done) -> None:
        await asyncio.create_task(child())
        seen.append(current_delivery.get())

    run = Run(handler)
    await run.end()
    assert seen == [run.delivery, run.delivery]
    assert current_delivery.get() is None


async def test_handlers_take_the_event_alone_or_with_the_delivery() -> None:
    seen: list[Any] = []

    async def alone(event: Done) -> None:
        seen.append(event)

    async def both(event: Done, delivery: Delivery[Done]) -> None:
        seen.append((event, delivery))

    await Run(alone).end()
    run = Run(both)
    await run.end()
    assert seen == [Done(n=1), (Done(n=1), run.delivery)]


async def test_closing_a_slot_closes_its_handler() -> None:
    """As the event loop does with a task that it drops: the handler's `finally` runs."""
    closed: list[bool] = []

    async def handler(event: Done) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            closed.append(True)

    run = Run(handler)
    run.executor.triage(run.delivery)
    call = run.call()
    call.send(None)
    call.close()
    assert closed == [True]


# --- on_dead


async def told_of(on_dead: Any) -> Failure | None:
    async def handler(event: Done) -> None: ...

    run = Run(handler, on_dead=on_dead)
    dead = DeadLettered(run.delivery, "failed", Failure("ValueError", "why"))
    call = run.executor.call_on_dead(run.slot, dead, SimpleNamespace())  # type: ignore[arg-type]
    return await SlotTask(call, loop=asyncio.get_running_loop())  # type: ignore[arg-type, func-returns-value]


@both_ways
@pytest.mark.parametrize(
    "error",
    [ValueError("why"), SystemExit("why"), KeyboardInterrupt("why"), GeneratorExit("why"), Mute()],
    ids=lambda e: type(e).__name__,
)
async def test_whatever_on_dead_raises_is_only_told(error: BaseException, suspend: bool) -> None:
    async def on_dead(dead: DeadLettered, bus: Any) -> None:
        if suspend:
            await asyncio.sleep(0)
        raise error

    failure = await told_of(on_dead)
    assert failure is not None
    assert failure.type == type(error).__name__


@both_ways
async def test_an_on_dead_that_returns_has_not_failed(suspend: bool) -> None:
    async def on_dead(dead: DeadLettered, bus: Any) -> None:
        if suspend:
            await asyncio.sleep(0)

    assert await told_of(on_dead) is None


# --- triage


async def noop(event: Done) -> None: ...


def triaged(**fields: bytes) -> Verdict | None:
    return executor(noop).triage(delivery(**fields))


def test_a_good_entry_is_decoded() -> None:
    good = delivery()
    assert executor(noop).triage(good) is None
    assert good.event == Done(n=1)


def test_a_type_not_asked_for_is_skipped_whatever_its_data() -> None:
    assert triaged(type=b"other.thing", data=b"garbage") is SKIP
    assert triaged(type=b"other.thing", v=b"garbage") is SKIP


@pytest.mark.parametrize("twice", [False, True])
def test_of_a_redrive_a_type_not_asked_for_is_a_dead_letter_again(twice: bool) -> None:
    """The inbox deletes what is acked, and this entry is nowhere else."""
    reader = executor(noop)

    def came(run: bytes | None) -> Verdict | None:
        entry = delivery(type=b"other.thing", data=b"garbage", origentry=b"5-0")
        if run is not None:
            entry.fields += [b"run", run]
        entry.origin = Origin("g", f"{ORIGIN.home}:inbox:g", ORIGIN.home, ORIGIN.bus, envelope_of)
        return reader.triage(entry)

    if twice:  # by then it is known that the type is not asked for
        assert reader.triage(delivery(type=b"other.thing")) is SKIP
    verdict = came(b"redrive-1")
    assert isinstance(verdict, DeadLetter)
    assert (verdict.reason, verdict.error.type) == ("rejected", "NotAskedFor")
    assert verdict.error.text.startswith("the handler does not ask for other.thing any more: ")
    assert came(b"replay-1") is SKIP, "the stream has it"
    assert came(None) is SKIP, "moved aside: as if it had been read from the stream"
    own = delivery(type=b"other.thing", origentry=b"5-0", run=b"redrive-1")
    assert reader.triage(own) is SKIP, "fields of an event, not of an inbox"


@pytest.mark.parametrize(
    "fields",
    [
        {"data": b"no json"},
        {"data": b"\xff"},
        {"data": b'{"n":"text"}'},
        {"data": b"[" * 100_000},
        {"type": b"\xff\xff"},
        {"v": b"x"},
        {"datacontenttype": b"text/plain"},
    ],
)
def test_what_cannot_be_decoded_is_dead_lettered(fields: dict[str, bytes]) -> None:
    verdict = triaged(**fields)
    assert isinstance(verdict, DeadLetter)
    assert verdict.reason == "undecodable"


def test_one_bad_entry_does_not_spoil_its_type() -> None:
    reader = executor(noop)
    assert isinstance(reader.triage(delivery(data=b"no json")), DeadLetter)
    assert reader.triage(delivery()) is None
    assert isinstance(reader.triage(delivery(data=b"no json")), DeadLetter)


def test_a_newer_version_is_parked_for_a_day_and_then_dead_lettered() -> None:
    now_ms = int(time.time() * 1000)
    day_ms = int(UNKNOWN_TYPE_MAX_AGE_S * 1000)
    young = delivery(v=b"2", entry_id=f"{now_ms - day_ms + 60_000}-0")
    verdict = executor(noop).triage(young)
    assert isinstance(verdict, Park)
    assert (verdict.delay_s, verdict.error) == (UNKNOWN_TYPE_PARK_S, None)
    old = delivery(v=b"2", entry_id=f"{now_ms - day_ms - 60_000}-0")
    verdict = executor(noop).triage(old)
    assert isinstance(verdict, DeadLetter)
    assert verdict.reason == "newer-version"


def test_the_age_of_a_moved_entry_is_that_of_the_entry_it_was() -> None:
    """Its id in the inbox says when it was moved; each move would give it another day."""
    old = f"{int((time.time() - UNKNOWN_TYPE_MAX_AGE_S - 60) * 1000)}-0".encode()
    entry = delivery(v=b"2", origentry=old)
    assert isinstance(executor(noop).triage(entry), Park)  # a field of that name in the stream
    entry.origin = Origin("g", f"{ORIGIN.home}:inbox:g", ORIGIN.home, ORIGIN.bus, envelope_of)
    assert isinstance(executor(noop).triage(entry), DeadLetter)
    entry.fields[-1] = b"no id"
    assert isinstance(executor(noop).triage(entry), Park)


def test_an_unknown_type_is_looked_up_again_once_its_class_has_come() -> None:
    reader = executor(noop)
    assert isinstance(reader.triage(delivery(v=b"9")), Park)

    class Ninth(Event, type="exec.done", version=9):
        n: int

    assert reader.triage(delivery(v=b"9")) is None


def test_an_older_version_without_a_way_up_never_comes() -> None:
    verdict = triaged(type=b"exec.second", v=b"1")
    assert isinstance(verdict, DeadLetter)
    assert verdict.reason == "undecodable"
    assert "known versions: [2]" in verdict.error.text


# --- the crash budget


@pytest.mark.parametrize(("count", "crashed"), [(1, False), (3, False), (4, True), (9, True)])
def test_a_reclaimed_entry_has_crashed_above_max_attempts(count: int, crashed: bool) -> None:
    """At `max_attempts` it still runs: the count cannot tell fetched from started."""
    verdict = executor(noop, max_attempts=3).crashed(delivery(attempt=count))
    assert (isinstance(verdict, DeadLetter) and verdict.reason == "crashed") is crashed
