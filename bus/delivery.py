"""The life of an event in one group. Everything that can become of a delivery stands here.

State is a place that `redis-cli` can show:

| state | where it lives | leaves by |
|---|---|---|
| appended | the stream, id above the group's last-delivered-id | `XREADGROUP >` |
| running | pending, owner = a worker's consumer, renewed while held | a verdict, below |
| parked | pending, owner = the lane `parked:<ms>`: the server time at which all of it is due; \
idle = time since the failure; the delivery count stays | due: taken by a worker, count + 1 |
| orphaned | pending, owner = a worker whose lease is gone, or idle >= visibility | reclaim |
| acked | in the stream only (in an inbox: nowhere) | trim, once no group needs it |
| moved | the group's inbox, with `origentry`, `attempts` and `due`: it was parked, and held up a \
stream that is nearly full | `XREADGROUP >`; parked there again until due |
| dead-lettered | the group's dead-letter stream, with the reason | redrive into its inbox; purge |
| lost | a pending id whose entry was deleted by hand | acked, counted, told; never silent |
| overrun | nowhere: `on_full="drop_oldest"` made room | acked, counted in `:overrun`, told |

A *verdict* ends an attempt. The executor decides it (`worker/executor.py`, no I/O); the settler
brings it to the server in batches (`worker/settler.py`), by scripts that do nothing unless the
entry is still pending *and still this worker's*:

    Ack         the handler returned, or the type was not asked for        XACK
    Commit      it returned and collected effects                          effects + XACK
    Park        it raised, or said RetryLater, or the type is not known,   XCLAIM to a lane
                or there is no room for what it publishes or its dead letter
    DeadLetter  attempts used up, Reject, undecodable, crashed,            XADD dead + XACK
                or redriven, and its type is not asked for any more
                (effects that failed half way: by the script that applied them)
    HandBack    never started, or cut off by shutdown or an open breaker   XCLAIM to `parked:0`

The delivery count of the pending list is the attempt number, for failures and crashes alike.
Reading and taking from a lane raise it; parking without using an attempt and handing back lower
it; reclaiming leaves it, and *starting* a reclaimed entry raises it. So a crash counts against
what was running, and entries that were only fetched lose at most one attempt.

Effects of which nothing could be applied are a failed attempt, found out late: the verdict becomes
a Park or a DeadLetter. With `once=` an event that another delivery has handled is acked unhandled,
and one that another is at is parked (`worker/once.py`).

When most events of a handler fail, its breaker opens (`worker/guard.py`): the failure is not
the events'. Nothing starts but a probe; what fails then is parked without using its attempt, and
what failed in the window before gets its attempts back (`refund.lua`, in the lane). For that
window `DeadLetter("failed")` is held in the worker's hand, as running; an outage makes it a Park.
"""

import logging
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from bus.effects import Effects
from bus.envelope import Envelope
from bus.errors import AlreadySettled, DeclarationError, Reject, RetryLater
from bus.event import Event

E_co = TypeVar("E_co", bound=Event, covariant=True)


# --- verdicts: decided in one place, applied in another


@dataclass(frozen=True, slots=True)
class Ack:
    """Handled. `skipped`: acked because the handler did not ask for the type."""

    skipped: bool = False


@dataclass(frozen=True, slots=True)
class Park:
    """Not now: wait `delay_s` seconds in a lane.

    error: what failed; None if nothing did, and then no attempt is used up.
    counts: whether the failure uses up an attempt; one during an outage does not.
    until_ms: the server time to wait for instead of `delay_s`, of an entry that was parked before.
    """

    delay_s: float
    error: "Failure | None" = None
    reason: str = ""
    counts: bool = True
    until_ms: int = 0

    @property
    def uses_attempt(self) -> bool:
        """Whether the attempt that ends so is gone."""
        return self.counts and self.error is not None


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """Never: move to the dead letters.

    reason: `failed` (attempts used up), `rejected`, `undecodable`, `newer-version`, `crashed`,
    `effects-failed`.
    """

    reason: str
    error: "Failure"


@dataclass(frozen=True, slots=True)
class HandBack:
    """Unstarted, or cut off by a shutdown or an outage: any worker may take it, no attempt used."""


@dataclass(frozen=True, slots=True)
class Commit:
    """Handled, with effects (`delivery.effects`): they and the ack are one script."""


Verdict = Ack | Commit | Park | DeadLetter | HandBack
ACK = Ack()
COMMIT = Commit()
SKIP = Ack(skipped=True)
HAND_BACK = HandBack()


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong in an attempt.

    type: name of the exception class. text: its message. where: `file:line function` of the
    innermost frame outside the bus. traceback: as Python prints it; both may be empty.
    """

    type: str
    text: str
    where: str = ""
    traceback: str = field(default="", repr=False)


# --- what is delivered

REPLAY, REDRIVE = "replay-", "redrive-"  # how the name of a run begins


class Publishes(Protocol):
    """What a delivery knows of the bus: that one can publish with it."""

    async def publish(self, event: Event, /) -> Any:
        """Publish one event."""

    async def publish_many(self, events: Any, /) -> Any:
        """Publish several events."""

    def channel(self, name: str, /, *, ttl: Any = ..., maxlen: int = ...) -> Any:
        """Return a short-lived topic for one run."""

    def effects_of(self, delivery: "Delivery[Any]", /) -> Effects:
        """Return an empty collection of effects for a delivery."""

    @property
    def redis(self) -> Any:
        """A plain redis.asyncio client."""


@dataclass(slots=True, eq=False)
class Origin:
    """What all deliveries of one stream to one group share.

    stream: what is read. home: where the entries lay first; another one if `stream` is an inbox.
    """

    group: str
    stream: str
    home: str
    bus: Publishes
    open_envelope: Callable[["Delivery[Any]"], Envelope]
    state: Any = None


NOT_DECODED: Any = None  # the `event` of a delivery that no worker has looked into


class Delivery(Generic[E_co]):
    """An entry handed to a group for the n-th time.

    A handler's second argument, or one of the list that a batch handler takes. `attempt` is 1 for
    the first. After the handler has returned or raised, the delivery is settled and what is
    published no longer belongs to it. A batch handler may settle single ones before, by `fail`,
    `reject` or `retry_later`.
    """

    __slots__ = (
        "_batch",  # BatchCause; unset outside batches, so that nobody else pays for it
        "_envelope",
        "attempt",
        "checked_at",
        "collected",
        "condemned",
        "entry_id",
        "event",
        "fields",
        "ordinals",
        "origin",
        "parked",
        "received_at",
        "reclaimed",
        "settled",
    )

    event: E_co
    _batch: "BatchCause"

    def __init__(
        self,
        origin: Origin,
        entry_id: bytes,
        fields: list[bytes],
        attempt: int,
        checked_at: float,
        received_at: float = 0.0,
    ) -> None:
        self.origin = origin
        self.event = NOT_DECODED  # until a worker is about to handle it
        self.entry_id = entry_id
        self.fields = fields
        self.attempt = attempt
        self.checked_at = checked_at  # loop time at which it was last known to be ours
        self.received_at = received_at  # loop time
        self.reclaimed = False  # taken from another worker, and not started here yet
        self.parked = False  # taken from a lane
        self.condemned: DeadLetter | None = None  # decided, and held until no outage is in sight
        self.settled = False
        self.ordinals: dict[tuple[str, str], int] | None = None
        self.collected: Effects | None = None  # once the handler has asked for its effects
        self._envelope: Envelope | None = None

    @property
    def effects(self) -> Effects:
        """Commands on Redis state that take place with the ack, in one script, or not at all.

        They are applied once per delivery, whatever crashes; see `Effects` for the commands.
        """
        if self.collected is None:
            self.collected = self.origin.bus.effects_of(self)
            if self.settled:
                self.collected.close(_TOO_LATE)
        return self.collected

    def close_effects(self) -> None:
        """Collect no more: the handler has returned."""
        if self.collected is not None:
            self.collected.close(_TOO_LATE)

    def refuse_effects(self, why: str) -> None:
        """Collect none: what they would take part in is not to be."""
        self.close_effects()
        self.collected = Effects.none(why)

    @property
    def envelope(self) -> Envelope:
        """The event's headers and place; made when first asked for."""
        if self._envelope is None:
            self._envelope = self.origin.open_envelope(self)
        return self._envelope

    @property
    def replayed(self) -> bool:
        """Whether a replay brought it; `envelope.entry_id` and `.time` are those it had before."""
        return self._run.startswith(REPLAY)

    @property
    def redriven(self) -> bool:
        """Whether it was a dead letter, and brought back by hand."""
        return self._run.startswith(REDRIVE)

    @property
    def _run(self) -> str:
        return "" if self.origin.stream == self.origin.home else self.envelope.run

    @property
    def group(self) -> str:
        """The handler's group."""
        return self.origin.group

    @property
    def bus(self) -> Any:
        """The bus; what is published through it while handling is marked as caused by this."""
        return self.origin.bus

    @property
    def state(self) -> Any:
        """What the package's `lifespan` yielded."""
        return self.origin.state

    @property
    def logger(self) -> "logging.LoggerAdapter[logging.Logger]":
        """A logger whose records carry group, stream, entry id, event id and attempt."""
        return logging.LoggerAdapter(
            logging.getLogger(f"bus.handler.{self.group}"),
            {
                "group": self.group,
                "stream": self.origin.stream,
                "entry_id": self.entry_id.decode(),
                "event_id": self.envelope.event_id,
                "attempt": self.attempt,
            },
        )

    # --- in a batch handler

    def fail(self, error: BaseException) -> None:
        """Settle this one of a batch as if the handler had raised `error` for it alone.

        An ordinary exception is a failed attempt: retried with backoff, then a dead letter. Raises
        nothing and ends nothing: go on with the others. Errors: TypeError if `error` is no
        exception, AlreadySettled, DeclarationError outside a batch handler.
        """
        if not isinstance(error, BaseException):
            raise TypeError(
                f"delivery.fail takes an exception, not {error!r}: fail(ValueError('why'));"
                " to dead-letter it now, delivery.reject('why')"
            )
        self._settle_singly(error, "raise the error")

    def reject(self, reason: object) -> None:
        """Settle this one of a batch as a dead letter now, as `raise Reject(reason)` would.

        Errors: AlreadySettled, DeclarationError outside a batch handler.
        """
        self._settle_singly(Reject(reason), "raise Reject(reason)")

    def retry_later(self, delay_s: float) -> None:
        """Park this one of a batch for `delay_s` seconds, using up no attempt, as RetryLater does.

        Errors: ValueError for what is no delay, AlreadySettled, DeclarationError outside a batch
        handler.
        """
        self._settle_singly(RetryLater(delay_s), "raise RetryLater(delay_s)")

    def _settle_singly(self, error: BaseException, instead: str) -> None:
        batch = getattr(self, "_batch", None)
        if batch is None:
            raise DeclarationError(
                f"only a batch handler, while it runs, settles deliveries one by one: in an"
                f" ordinary handler {instead} instead, or declare group {self.group} with batch="
            )
        if batch.settled:
            raise AlreadySettled(f"{self!r} was settled when the call of its batch ended")
        if self in batch.answers:
            first = type(batch.answers[self]).__name__
            raise AlreadySettled(f"{self!r} was settled before, by {first}: that one holds")
        batch.answers[self] = error

    def __repr__(self) -> str:
        return (
            f"<Delivery {self.entry_id.decode()} of {self.origin.stream}"
            f" to {self.group}, attempt {self.attempt}>"
        )


_TOO_LATE = (
    "the handler has returned: its effects are on their way. Collect them before, and await the"
    " tasks that do"
)


class BatchCause:
    """The deliveries of one call of a batch handler: together they cause what it publishes.

    answers: how single ones were settled, as the exceptions that would say so. settled: whether the
    call has ended; then it holds no deliveries any more.
    """

    __slots__ = ("answers", "deliveries", "depth", "settled")

    def __init__(self, deliveries: Sequence[Delivery[Any]]) -> None:
        self.deliveries = deliveries
        self.depth: int | None = None  # of the longest chain of causes, once somebody has looked
        self.answers: dict[Delivery[Any], BaseException] = {}
        self.settled = False
        for delivery in deliveries:
            delivery._batch = self  # noqa: SLF001 - one thing in two classes

    def end(self) -> dict[Delivery[Any], BaseException]:
        """Let nothing more be settled singly; return what was."""
        answers, self.answers = self.answers, {}
        self.deliveries = ()  # they know this, and must not have to wait for a garbage collection
        self.settled = True
        return answers


# What is being handled in this context; set by the slot for each call, void once it is settled. A
# batch of one is handled as that delivery.
current_delivery: ContextVar[Delivery[Any] | BatchCause | None] = ContextVar(
    "current_delivery", default=None
)


@dataclass(frozen=True, slots=True)
class DeadLettered:
    """What `on_dead` is told: the delivery that is about to become a dead letter, and why."""

    delivery: Delivery[Any]
    reason: str
    error: Failure

    @property
    def envelope(self) -> Envelope:
        """The entry's headers. Errors: Undecodable when the entry has none."""
        return self.delivery.envelope

    @property
    def event(self) -> Event:
        """The decoded event. Errors: Undecodable, UnknownEventType."""
        return self.delivery.envelope.event
