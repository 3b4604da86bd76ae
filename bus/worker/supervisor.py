"""A worker: starts the parts, keeps them running, and drains them in the right order.

async with Worker(bus, handlers=[index_document]) as worker:
    await worker.drained(timeout_s=10)
"""

import asyncio
import contextlib
import os
import re
import secrets
import socket
import traceback
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Protocol, Self

from bus.committer import Committer
from bus.config import (
    GRACE_S,
    JANITOR_S,
    LEASE_S,
    PAUSES_S,
    PRESSURE_S,
    REPLY_TIMEOUT_S,
    TOPICS_S,
    checked_name,
    checked_number,
)
from bus.delivery import Publishes
from bus.errors import BusError, DeclarationError
from bus.handler import Handler, Registry
from bus.hooks import Hooks
from bus.streams.connection import is_transient
from bus.streams.keys import inbox, is_inbox
from bus.streams.replies import ReplyError
from bus.streams.topics import Record, TopicTable
from bus.worker.batches import BatchConsumer
from bus.worker.consumer import Consumer
from bus.worker.executor import failure_of
from bus.worker.hooked import Hooked
from bus.worker.janitor import Janitor, JanitorsBus
from bus.worker.lease import Lease
from bus.worker.pauses import Pauses
from bus.worker.pressure import Pressure
from bus.worker.reclaimer import Reclaimer
from bus.worker.singles import SingleConsumer
from bus.worker.turn import Turn

_TICK_S = 0.05  # how exactly timeout_s is kept
_STUCK_S = 1.0  # how long a handler may resist its cancellation before it is left behind
_FLUSH_S = 2.0  # what the last verdicts get when the server does not answer at the end


class WorkersBus(Publishes, JanitorsBus, Protocol):
    """What a worker needs of a bus."""

    topics: TopicTable
    committer: Committer
    hooks: Hooks

    @property
    def address(self) -> str:
        """Where the server is, without a password."""

    async def ready(self) -> None:
        """Connect and check the server."""


class Worker:
    """Runs handlers in this process until it is stopped.

    handlers: `Handler`s made by `event_handler`, or a Registry.
    only: run only these groups. concurrency: overrides that of every handler.
    name: unique among live workers; by default host, pid and a random part.
    lifespan: `lifespan(bus)`, an async context manager; what it yields is `delivery.state`.
    grace_s: what running handlers get at stop before they are cancelled, in seconds.
    lease_s: others take over when this worker was not heard of for so long, in seconds.
    Errors: DeclarationError, ServerError at start; what breaks later is raised by `wait`.
    """

    def __init__(
        self,
        bus: WorkersBus,
        handlers: Iterable[Handler[...] | type] | Registry,
        *,
        only: Iterable[str] = (),
        concurrency: int | None = None,
        name: str | None = None,
        lifespan: Callable[[Any], AbstractAsyncContextManager[Any]] | None = None,
        grace_s: float = GRACE_S,
        lease_s: float = LEASE_S,
    ) -> None:
        registry = handlers if isinstance(handlers, Registry) else Registry(handlers)
        self._bus = bus
        self._store = bus.store
        self._telemetry = bus.telemetry
        self._handlers = _chosen(registry.handlers, tuple(only))
        self._lifespan = lifespan or registry.lifespan
        self._grace_s = checked_number(grace_s, "grace_s", 0, 86_400)
        self._lease_s = checked_number(lease_s, "lease_s", 0.3, 3_600)
        if concurrency is not None:
            checked_number(concurrency, "concurrency", 1, 10_000, whole=True)
        self.name = checked_name(name, "worker name") if name else _own_name()
        for topic in registry.topics:
            bus.topics.declare(topic)
        turn = Turn()
        crowded: set[str] = set()  # streams that are nearly full, see Pressure
        readers = self._store.readers([h.group for h in self._handlers])
        self._consumers: list[Consumer] = [
            (BatchConsumer if handler.batch else SingleConsumer)(
                handler,
                self.name,
                self._store,
                bus,
                self._telemetry,
                bus.committer,
                reader,
                concurrency=concurrency or handler.concurrency,
                lease_s=self._lease_s,
                turn=turn,
                crowded=crowded,
            )
            for handler, reader in zip(self._handlers, readers, strict=True)
        ]
        self._hooked = Hooked(bus.hooks, self._consumers)
        self._lease = Lease(
            self._store, self.name, self._consumers, self._telemetry, lease_s=self._lease_s
        )
        self._reclaimer = Reclaimer(
            self._store,
            self.name,
            self._consumers,
            self._telemetry,
            self._lease.others_can_be_judged,
        )
        self._records: dict[str, Record] = {}  # partition -> what is recorded of its topic
        self._janitor = Janitor(bus, self.name, self._consumers, self._records)
        self._pauses = Pauses(self._store, self.name, self._consumers, self._telemetry)
        self._pressure = Pressure(self._store, self.name, self._records, crowded, self._telemetry)
        self._state: Any = None
        self._exits = contextlib.AsyncExitStack()
        self._intakes: dict[Consumer, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._beating: asyncio.Task[None] | None = None
        self._sweeping: asyncio.Task[None] | None = None
        self._failed: asyncio.Future[None] | None = None
        self._stopped = False

    # --- start

    async def start(self) -> None:
        """Check the server, make groups and leases, and begin to read."""
        await self._bus.ready()
        loop = asyncio.get_running_loop()
        self._failed = loop.create_future()
        if self._lifespan is not None:
            self._state = await self._exits.enter_async_context(self._lifespan(self._bus))
        try:
            await self._serve_topics()
            await self._lease.beat()
            await self._janitor.name_unserved()
        except ReplyError as error:
            await self._exits.aclose()
            raise error.refusal(self._bus.address) from None
        except BaseException:
            await self._exits.aclose()
            raise
        self._hooked.begin()
        for consumer in self._consumers:
            intake, *rest = consumer.start()
            self._intakes[consumer] = intake
            for task in (intake, *rest):
                self._watch(task)
        self._beating = loop.create_task(self._lease.run(), name="lease")
        self._sweeping = loop.create_task(self._reclaimer.run(), name="reclaimer")
        self._watch(self._beating)
        self._watch(self._sweeping)
        self._watch(loop.create_task(_every(_TICK_S, self._tick), name="tick"))
        self._watch(loop.create_task(_every(TOPICS_S, self._look_at_topics), name="topics"))
        self._watch(loop.create_task(_every(PAUSES_S, self._pauses.keep), name="pauses"))
        self._watch(loop.create_task(_every(JANITOR_S, self._janitor.tidy), name="janitor"))
        self._watch(loop.create_task(_every(PRESSURE_S, self._pressure.relieve), name="pressure"))
        self._telemetry.emit(
            "worker.started",
            worker=self.name,
            server=self._bus.address,
            groups=[c.group for c in self._consumers],
            streams=self._lease.streams,
        )

    async def _serve_topics(self) -> None:
        """Find the streams of every handler and make its groups there; new ones are added."""
        wanted: list[tuple[Consumer, str]] = []
        for consumer in self._consumers:
            for topic in consumer.handler.reads():
                record = await self._bus.topics.record_to_read(topic)
                for stream in self._bus.topics.streams(topic, record.partitions):
                    self._records[stream] = record
                    wanted += [(consumer, stream), (consumer, inbox(stream, consumer.group))]
        wanted = [(c, stream) for c, stream in wanted if stream not in c.hands]
        if not wanted:
            return
        # A partition that appears while we run holds only what is new, so nothing is skipped.
        first = {"beginning": "0", "now": "0" if self._intakes else "$"}
        results = await self._store.create_groups(
            [(s, c.group, "0" if is_inbox(s) else first[c.handler.start]) for c, s in wanted]
        )
        paused = await self._pauses.first_look()
        for (consumer, stream), result in zip(wanted, results, strict=True):
            if isinstance(result, ReplyError) and result.code != "WRONGTYPE":
                raise result.explained(stream)
            if result is True and not is_inbox(stream):
                self._telemetry.emit("group.created", stream=stream, group=consumer.group)
            consumer.serve([stream], self._state)
        await self._pauses.apply(paused)  # before any of them is read
        for (consumer, _), result in zip(wanted, results, strict=True):
            if isinstance(result, ReplyError):
                await consumer.intake.find_broken()
            consumer.intake.look_again()

    def _watch(self, task: "asyncio.Task[None]") -> None:
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if task.cancelled():
            if self._stopped:
                return
            error: BaseException = asyncio.CancelledError("cancelled from outside")
        else:
            exception = task.exception()
            if exception is None:
                return
            error = exception
        failure = failure_of(error)
        if not isinstance(error, BusError):
            traceback.print_exception(error)  # a bug of ours: say all there is
        self._telemetry.emit(
            "worker.failed",
            worker=self.name,
            part=task.get_name(),
            error_type=failure.type,
            error=failure.text,
            where=failure.where,
        )
        if self._failed is not None and not self._failed.done():
            self._failed.set_exception(
                BusError(f"{task.get_name()} was cancelled") if task.cancelled() else error
            )
            self._failed.exception()  # `wait` may never be called
        # Half a worker must not keep what it cannot handle: others take over when its lease ends.
        self._reclaimer.stop()
        if self._beating is not None:
            self._beating.cancel()
        for consumer in self._consumers:
            consumer.quit()

    async def _look_at_topics(self) -> None:
        """Notice partitions that were declared meanwhile; write down what a server has lost."""
        try:
            await self._serve_topics()
        except BusError as error:
            self._telemetry.emit(
                "topics.failed", worker=self.name, error_type=type(error).__name__, error=str(error)
            )

    async def _tick(self) -> None:
        now = asyncio.get_running_loop().time()
        for consumer in self._consumers:
            consumer.look_after(now)

    # --- while it runs

    async def wait(self) -> None:
        """Wait until a part of the worker breaks, and raise what broke it."""
        if self._failed is None:
            raise BusError("the worker has not been started")
        await asyncio.shield(self._failed)

    async def drained(self, timeout_s: float = 30.0) -> None:
        """Return when the backlog of all handlers is empty: nothing undelivered, pending, parked.

        Dead letters are done, too: look at them where that matters.

        Looks every 20 ms: XINFO GROUPS and XRANGE of one entry per stream. Errors: TimeoutError
        that says what is left, or that the server does not answer; what broke the worker.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while True:
            try:
                left = await self._left()
            except BusError as error:
                if not is_transient(error):
                    raise
                left = [f"the server does not say: {error}"]
            if not left:
                return
            if self._failed is not None and self._failed.done():
                self._failed.result()
            if loop.time() >= end:
                raise TimeoutError(f"not drained after {timeout_s} s: {'; '.join(left)}")
            await asyncio.sleep(0.02)

    async def _left(self) -> list[str]:
        left = []
        for consumer in self._consumers:
            if consumer.busy:
                left.append(f"{consumer.group} is at work")
                continue
            for stream, hand in list(consumer.hands.items()):
                if stream in consumer.intake.broken:
                    continue
                paused = ", and is paused" if hand.paused else ""
                standing = await self._store.standing(stream, consumer.group)
                if standing is None:
                    left.append(f"{consumer.group} is gone from {stream}")
                elif standing.undelivered:
                    left.append(f"{consumer.group} has undelivered entries in {stream}{paused}")
                elif standing.pending:
                    waits = f"{standing.pending} pending in {stream}{paused}"
                    left.append(f"{consumer.group} has {waits}")
        return left

    # --- stop

    async def stop(self, reason: str = "stop") -> None:
        """Drain: read no more, hand back what has not started, let the rest finish, say goodbye.

        What runs longer than `grace_s` is cancelled and handed back, its attempt not counted. The
        same time is what `on_dead` gets, where it is told only now.
        """
        if self._stopped:
            return
        self._stopped = True
        self._telemetry.emit("worker.stopping", worker=self.name, reason=reason)
        loop = asyncio.get_running_loop()
        # First nothing more comes in by any way, then what has not started is handed back.
        self._reclaimer.stop()
        if self._sweeping is not None:
            await asyncio.wait([self._sweeping], timeout=REPLY_TIMEOUT_S)
        handed_back = sum(
            await asyncio.gather(*(c.stop_reading(t) for c, t in self._intakes.items()))
        )
        grace_ends = loop.time() + self._grace_s
        cancelled = await self._end_calls(grace_ends)
        await self._all(Consumer.verdicts_applied, _FLUSH_S)
        if any(c.tells_late for c in self._consumers):  # effects failed as they were applied
            cancelled += await self._end_calls(grace_ends)
        for consumer in self._consumers:
            await consumer.close()
        self._hooked.end()
        await self._cancel_tasks()
        await self._say_goodbye()
        await self._exits.aclose()
        self._telemetry.emit(
            "worker.stopped", worker=self.name, handed_back=handed_back, cancelled=cancelled
        )

    async def _end_calls(self, grace_ends: float) -> int:
        """Let calls end until then, and cancel the rest; return how many that were."""
        left_s = grace_ends - asyncio.get_running_loop().time()
        if await self._all(Consumer.calls_ended, max(0.0, left_s)):
            return 0
        cancelled = sum(c.cancel_calls() for c in self._consumers)
        await self._all(Consumer.calls_ended, _STUCK_S)
        return cancelled

    async def _all(self, step: Callable[[Consumer], Awaitable[None]], within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                await asyncio.gather(*(step(c) for c in self._consumers))
        except TimeoutError:
            return False
        return True

    async def _cancel_tasks(self) -> None:
        # Slots and settlers end by themselves now; the loops of `_every` have to be told. A
        # handler that ignores its cancellation cannot be waited for.
        if self._tasks:
            _, late = await asyncio.wait(list(self._tasks), timeout=0.05)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=_STUCK_S)

    async def _say_goodbye(self) -> None:
        """Give up leases and leave the groups, so that nobody has to find out that we are gone."""
        me = self.name.encode()
        try:
            async with asyncio.timeout(_FLUSH_S):
                await self._lease.end()
                for consumer in self._consumers:
                    for stream in list(consumer.hands):
                        with contextlib.suppress(ReplyError):
                            await self._store.leases.forget_consumer(stream, consumer.group, me)
                for stream in self._lease.streams:
                    if await self._nothing_left(stream):
                        await self._store.leases.unlist_worker(stream, me)
        except (BusError, TimeoutError):
            pass  # the server is away: the leases run out, and a janitor forgets us

    async def _nothing_left(self, stream: str) -> bool:
        hands = [h for c in self._consumers for h in c.hands.values() if h.home == stream]
        survey = await self._store.leases.survey(stream, [(h.stream, h.group) for h in hands])
        return not any(
            c.name == self.name.encode() for rows in survey.consumers.values() for c in rows
        )

    @property
    def stuck(self) -> bool:
        """Whether tasks are left after `stop` because their handlers ignore cancellation."""
        left_behind = bool(self._tasks) or any(c.tells_late for c in self._consumers)
        return self._stopped and left_behind

    async def __aenter__(self) -> Self:
        """Start."""
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Drain."""
        await self.stop("leaving the block")


async def _every(interval_s: float, step: Callable[[], Awaitable[None]]) -> None:
    """Run `step` again and again; the one loop of all chores."""
    while True:
        await asyncio.sleep(interval_s)
        await step()


def _chosen(handlers: Sequence[Handler[...]], only: tuple[str, ...]) -> list[Handler[...]]:
    unknown = set(only) - {h.group for h in handlers}
    if unknown:
        raise DeclarationError(
            f"no handler has the group {', '.join(sorted(unknown))};"
            f" there are: {', '.join(sorted(h.group for h in handlers)) or 'none'}"
        )
    chosen = [h for h in handlers if not only or h.group in only]
    if not chosen:
        raise DeclarationError("a worker needs at least one handler")
    return chosen


def _own_name() -> str:
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:60].lstrip("._-") or "host"
    return f"{host}-{os.getpid()}-{secrets.token_hex(3)}"
