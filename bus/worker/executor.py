"""What becomes of a delivery: looks at it, runs the handler, returns a verdict. Touches no Redis.

The rules are the table in `bus/delivery.py`; this file is their only implementation.
"""

import asyncio
import contextlib
import time
import traceback
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextvars import Context, copy_context
from pathlib import Path
from typing import Any, NamedTuple

from bus.config import (
    NOT_PUBLISHED_PARK_S,
    RETRY_LATER_MIN_S,
    UNKNOWN_TYPE_MAX_AGE_S,
    UNKNOWN_TYPE_PARK_S,
)
from bus.delivery import (
    ACK,
    COMMIT,
    HAND_BACK,
    SKIP,
    BatchCause,
    DeadLetter,
    DeadLettered,
    Delivery,
    Failure,
    Park,
    Publishes,
    Verdict,
    current_delivery,
)
from bus.errors import (
    EffectsFailed,
    PublishRefused,
    Reject,
    RetryLater,
    StreamFull,
    Undecodable,
    UnknownEventType,
    words_of,
)
from bus.event import Event, EventInfo, newest_version
from bus.handler import Handler
from bus.streams.codec import (
    Located,
    decode,
    info_for,
    is_redriven,
    locate,
    original_id,
    plain_entry,
)

_TEXT_BYTES = 2_000  # of an error's message kept in a dead letter
_TRACEBACK_BYTES = 8_000
_OWN_CODE = str(Path(__file__).parent.parent)


class SlotTask(asyncio.Task[None]):
    """A slot's task; knows when the whole event loop is being torn down around it."""

    torn_down = False

    def cancel(self, msg: Any | None = None) -> bool:
        """Cancel as any task."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # asyncio.run cancels what is left when its loop no longer runs
            self.torn_down = True
        return super().cancel(msg)


class Slot:
    """One of a handler's long-lived tasks, and what it is doing now.

    started_at: loop time at which the handler was called, 0.0 when none is.
    cancel_reason: why the supervisor cancelled the call: "timeout" or "shutdown".
    """

    __slots__ = ("cancel_reason", "cancelled_at", "delivery", "started_at", "task")

    def __init__(self) -> None:
        self.task: SlotTask | None = None
        self.delivery: Delivery[Any] | None = None
        self.started_at = 0.0
        self.cancelled_at = 0.0
        self.cancel_reason = ""

    @property
    def cut_off(self) -> str:
        """Why its last call was cancelled by us: "timeout", "shutdown", "" if it was not."""
        torn_down = self.task is not None and self.task.torn_down
        return self.cancel_reason or ("shutdown" if torn_down else "")

    def cancel(self, reason: str, now: float) -> None:
        """Cancel the call that runs, if any, for `reason`."""
        if self.task is not None and self.started_at:
            self.cancel_reason = reason
            self.cancelled_at = now
            self.task.cancel()


class BatchEnd(NamedTuple):
    """How a call of a batch handler has ended.

    succeeded: what was handled; see `succeeded`. others: the rest; `verdict_on` says what becomes
    of each, one by one, since describing thousands of failures takes a while.
    """

    succeeded: Sequence[Delivery[Any]]
    others: Sequence[Delivery[Any]]
    verdict_on: Callable[[Delivery[Any]], Verdict]


class Executor:
    """Turns deliveries of one handler into verdicts."""

    def __init__(self, handler: Handler[...]) -> None:
        self._handler = handler
        self._call, self._takes_delivery = handler.call, handler.takes_delivery
        self._infos: dict[tuple[bytes | None, bytes | None], EventInfo | None] = {}
        self._plain: dict[bytes | None, Callable[[bytes], Event]] = {}  # version 1, JSON

    def call_instead(self, call: Callable[..., Coroutine[Any, Any, Any]] | None) -> None:
        """Call that in the handler's place, with (event, delivery) or a list; None for itself."""
        if call is None:
            self._call, self._takes_delivery = self._handler.call, self._handler.takes_delivery
        else:
            self._call, self._takes_delivery = call, True

    # --- before the handler

    def triage(self, delivery: Delivery[Any]) -> Verdict | None:
        """Decode the event into `delivery.event`; return a verdict if it must not be handled."""
        plain = plain_entry(delivery.fields)
        if plain is not None and (decode_plain := self._plain.get(plain[0])) is not None:
            try:
                delivery.event = decode_plain(plain[1])
                return None
            except Exception:  # noqa: S110 - the long way round says what is wrong
                pass
        return self._triage_any(delivery)

    def _triage_any(self, delivery: Delivery[Any]) -> Verdict | None:
        """Triage an entry with any fields in any order."""
        located = locate(delivery.fields)
        try:
            info = self._infos[located.type, located.version]
        except KeyError:
            found = self._look_up(delivery, located)
            if not isinstance(found, EventInfo) and found is not SKIP:
                return found
            info = found if isinstance(found, EventInfo) else None
            if info is not None and info.encoding == "json" and located.version is None:
                self._plain[located.type] = info.decode
            if len(self._infos) < 10_000:  # noqa: PLR2004 - foreign writers may invent types
                self._infos[located.type, located.version] = info
        if info is None:
            return _unasked(delivery, located)
        try:
            delivery.event = decode(info, located)
        except Undecodable as error:
            return DeadLetter("undecodable", failure_of(error))
        return None

    def _look_up(self, delivery: Delivery[Any], located: Located) -> EventInfo | Verdict:
        if located.type is None:
            return DeadLetter(
                "undecodable", failure_of(Undecodable("the entry has no field `type`"))
            )
        try:
            name = located.type.decode()
            if not self._handler.wants(name):
                return SKIP
            return info_for(located.type, located.version)
        except UnknownEventType as error:
            return self._of_unknown_type(delivery, located, error)
        except (Undecodable, UnicodeDecodeError) as error:
            return DeadLetter("undecodable", failure_of(error))

    def _of_unknown_type(
        self, delivery: Delivery[Any], located: Located, error: UnknownEventType
    ) -> Verdict:
        """A deployment under way brings the class; an older version without upcast never comes."""
        assert located.type is not None
        if newest_version(located.type.decode()) > int(located.version or 1):
            return DeadLetter("undecodable", failure_of(error))
        age_s = time.time() - int(original_id(delivery).partition(b"-")[0]) / 1000
        if age_s > UNKNOWN_TYPE_MAX_AGE_S:
            return DeadLetter("newer-version", failure_of(error))
        return Park(UNKNOWN_TYPE_PARK_S, reason=str(error))

    def crashed(self, delivery: Delivery[Any]) -> Verdict | None:
        """Return the verdict for a reclaimed delivery that has used up its attempts, else None.

        At `max_attempts` it still runs once: the count cannot tell fetched from started.
        """
        if delivery.attempt <= self._handler.max_attempts:
            return None
        text = f"the worker died or hung {delivery.attempt} times with this event"
        return DeadLetter("crashed", Failure("Crashed", text))

    # --- the handler

    def begin(self, slot: Slot, delivery: Delivery[Any]) -> "Verdict | Suspended":
        """Run the handler until it ends, and return what that means, or until it first suspends.

        Runs in the slot's task, in a copy of its context: a handler that does not suspend costs
        neither a task nor a coroutine of ours, and `asyncio.timeout` or a task group inside it
        touches this slot alone.
        """
        current_delivery.set(delivery)
        context = copy_context()
        slot.cancel_reason = ""
        try:
            if self._takes_delivery:
                coroutine: Any = self._call(delivery.event, delivery)
            else:
                coroutine = self._call(delivery.event)
            waiting_for = context.run(coroutine.send, None)
        except StopIteration:
            return succeeded(delivery)
        except BaseException as error:
            return self._verdict_of(error, slot, delivery)
        return Suspended(coroutine, context, waiting_for)

    async def finish(self, slot: Slot, delivery: Delivery[Any], rest: "Suspended") -> Verdict:
        """Run what has suspended to its end; return what that means."""
        try:
            await rest
        except BaseException as error:
            if rest.closed:
                raise
            return self._verdict_of(error, slot, delivery)
        return succeeded(delivery)

    async def call_batch(self, slot: Slot, deliveries: Sequence[Delivery[Any]]) -> "BatchEnd":
        """Run a batch handler once for `deliveries` and return what its outcome means for each."""
        cause = BatchCause(deliveries)
        current_delivery.set(cause if len(deliveries) > 1 else deliveries[0])
        try:
            # A list of its own: it may sort it, or take out what it has done.
            error = await self._end_of(slot, lambda: self._call([*deliveries]))
        finally:
            answers = cause.end()
        cut_off = slot.cut_off
        meanings: dict[int, Verdict | Failure] = {}

        def verdict_on(delivery: Delivery[Any]) -> Verdict:
            said = answers.get(delivery, error)
            assert said is not None
            meaning = meanings.get(id(said))  # describing a failure once is dear enough
            if meaning is None:
                meaning = meanings[id(said)] = self._meaning_of(said, cut_off)
            return self.failed(delivery, meaning) if isinstance(meaning, Failure) else meaning

        if error is not None:
            return BatchEnd([], deliveries, verdict_on)
        if not answers:
            return BatchEnd(deliveries, [], verdict_on)
        succeeded = [d for d in deliveries if d not in answers]
        return BatchEnd(succeeded, [d for d in deliveries if d in answers], verdict_on)

    async def call_on_dead(self, slot: Slot, told: DeadLettered, bus: Publishes) -> Failure | None:
        """Run `on_dead` in the slot like a handler; return what it raised, None if nothing."""
        on_dead = self._handler.on_dead
        assert on_dead is not None
        told.delivery.refuse_effects("a dead letter has no effects: use bus.transaction()")
        current_delivery.set(told.delivery)
        error = await self._end_of(slot, lambda: on_dead(told, bus))
        return None if error is None else failure_of(error, slot.cancel_reason or None)

    async def _end_of(self, slot: Slot, call: Callable[[], Any]) -> BaseException | None:
        """Run what `call` returns as a handler is run; return what it raised, or None."""
        context = copy_context()
        slot.cancel_reason = ""
        rest: Suspended | None = None
        try:
            coroutine = call()
            rest = Suspended(coroutine, context, context.run(coroutine.send, None))
            await rest
        except StopIteration:
            return None
        except BaseException as error:
            if rest is not None and rest.closed:
                raise
            return error
        return None

    def _verdict_of(self, error: BaseException, slot: Slot, delivery: Delivery[Any]) -> Verdict:
        meaning = self._meaning_of(error, slot.cut_off)
        return self.failed(delivery, meaning) if isinstance(meaning, Failure) else meaning

    def _meaning_of(  # noqa: PLR0911 - one a meaning
        self, error: BaseException, cut_off: str
    ) -> Verdict | Failure:
        """Return the verdict on whatever raised `error`, or a Failure if that uses up an attempt.

        cut_off: see `Slot`.
        """
        if isinstance(error, Reject):
            return DeadLetter("rejected", failure_of(error, error.reason))
        if (park := _postponed(error)) is not None:
            return park
        if isinstance(error, EffectsFailed) and error.applied:
            # A transaction of the handler's: what stays must not be applied again.
            return DeadLetter("effects-failed", failure_of(error))
        if isinstance(error, asyncio.CancelledError):
            if cut_off == "timeout":
                limit = self._handler.timeout_s
                text = f"ran longer than timeout_s = {limit}"
                return Failure("TimeoutError", text, where=text)
            if cut_off:
                return HAND_BACK
            return failure_of(error, "the handler cancelled itself")
        return failure_of(error)

    def failed(self, delivery: Delivery[Any], failure: Failure) -> Verdict:
        """Return what becomes of a failed attempt: another one, or a dead letter."""
        if delivery.attempt >= self._handler.max_attempts:
            return DeadLetter("failed", failure)
        return Park(self._handler.backoff.delay_s(delivery.attempt), failure)


def _unasked(delivery: Delivery[Any], located: Located) -> Verdict:
    """Return what becomes of a type the handler did not ask for: it is acked, others see to it.

    Of an inbox that deletes the entry, and of a redriven one nobody else has a copy.
    """
    if not is_redriven(delivery):
        return SKIP
    kind = (located.type or b"").decode(errors="replace")
    text = f"the handler does not ask for {kind} any more: redrive it when it does, or purge it"
    return DeadLetter("rejected", Failure("NotAskedFor", text))


def succeeded(delivery: Delivery[Any]) -> Verdict:
    """Return what a call that returned means for one delivery."""
    return COMMIT if delivery.collected else ACK


def _postponed(error: BaseException) -> Park | None:
    """Return how long to wait if it is no fault of this event, None if it is a failure.

    The handler said so, or it could not publish: even the reserve is full, or the server takes no
    writes (it is out of memory, for example). A task group wraps what its tasks raise.
    """
    if isinstance(error, RetryLater):
        return Park(max(error.delay_s, RETRY_LATER_MIN_S), reason=str(error))
    if isinstance(error, StreamFull | PublishRefused):
        return Park(NOT_PUBLISHED_PARK_S, reason=str(error))
    if isinstance(error, BaseExceptionGroup):
        parks = [_postponed(e) for e in error.exceptions]
        if all(p is not None for p in parks):
            return max((p for p in parks if p is not None), key=lambda p: p.delay_s)
    return None


async def absorb_cancellation(task: SlotTask) -> None:
    """Use up cancellations that belong to the call that has just ended."""
    while task.cancelling():
        task.uncancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(0)


class Suspended:
    """Awaits the rest of a coroutine that has suspended once, inside its own context."""

    __slots__ = ("_context", "_coroutine", "_waiting_for", "closed")

    def __init__(
        self, coroutine: Coroutine[Any, Any, Any], context: Context, waiting_for: Any
    ) -> None:
        self._coroutine = coroutine
        self._context = context
        self._waiting_for = waiting_for
        self.closed = False  # whether the awaiting slot itself was closed, not the handler's doing

    def __await__(self) -> Generator[Any, Any, None]:
        run, coroutine, waiting_for = self._context.run, self._coroutine, self._waiting_for
        while True:
            try:
                try:
                    value = yield waiting_for
                except GeneratorExit:
                    self.closed = True
                    run(coroutine.close)
                    raise
                except BaseException as error:
                    waiting_for = run(coroutine.throw, error)
                else:
                    waiting_for = run(coroutine.send, value)
            except StopIteration:
                return


def failure_of(error: BaseException, text: str | None = None) -> Failure:
    """Describe an exception for logs and dead letters; bounded in size."""
    frames = traceback.extract_tb(error.__traceback__)
    users = [f for f in frames if not f.filename.startswith(_OWN_CODE)]
    last = users[-1] if users else None
    words = words_of(error) if text is None else text
    printed = "".join(traceback.format_list(users)) + f"{type(error).__name__}: {words}"
    return Failure(
        type=type(error).__name__,
        text=words.encode("utf-8", "replace")[:_TEXT_BYTES].decode("utf-8", "ignore"),
        where=f"{last.filename}:{last.lineno} {last.name}" if last else "",
        traceback=printed.encode("utf-8", "replace")[-_TRACEBACK_BYTES:].decode("utf-8", "ignore"),
    )
