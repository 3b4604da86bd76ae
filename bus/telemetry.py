"""Everything the bus emits, in one table, and how to listen.

The core emits and knows no metrics, tracing or logging library; those attach here.

    bus.telemetry.attach("delivery.*", lambda name, fields: ...)

A listener is called in the event loop, at the place where the thing happened, with the name and
a dict of the fields in the table: it must be quick and must not block. One that raises is
logged and changes nothing. No field ever holds an event's payload or a password; `error` is the
text of an exception, which a handler's author may have filled with anything, so it is logged at
DEBUG only (`error_type` and `where` always).
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from bus.errors import DeclarationError

Listener = Callable[[str, dict[str, Any]], None]


class Emitted(NamedTuple):
    """One row of the table: log level, fields, meaning."""

    level: int
    fields: tuple[str, ...]
    meaning: str


_D, _I, _W, _E = logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR
_ENTRY = ("stream", "group", "entry_id", "event_id", "event_type", "attempt")
_ERROR = ("error_type", "error", "where")

EVENTS: dict[str, Emitted] = {
    # the way in
    "publish.appended": Emitted(
        _D, ("stream", "count", "bytes", "duration_s"), "a batch is in the stream"
    ),
    "publish.retried": Emitted(
        _W, ("stream", "count", "error_type", "error"), "a batch is sent again, unchanged"
    ),
    "publish.full": Emitted(
        _W,
        ("stream", "pinned_by", "pending", "undelivered"),
        "a publish found no room in the stream; said once until one is taken whole again",
    ),
    "publish.rejected": Emitted(
        _D, ("stream", "count"), "callers that do not wait for room were told StreamFull"
    ),
    "publish.resumed": Emitted(_I, ("stream", "full_s"), "there is room again"),
    "publish.failed": Emitted(
        _E, ("stream", "count", "error_type", "error"), "callers were told that it failed"
    ),
    # in this process
    "observer.dropped": Emitted(
        _W,
        ("observer", "pattern", "count"),
        "too slow: it was not told of so many, its oldest; said once a second at most",
    ),
    "observer.failed": Emitted(
        _W, ("observer", "pattern", *_ERROR), "an observer raised; nobody else notices"
    ),
    # the way out
    "read.received": Emitted(_D, ("group", "count"), "entries were delivered to this worker"),
    "read.failed": Emitted(
        _W, ("group", "error_type", "error"), "a read failed; what it delivered is recovered first"
    ),
    "delivery.acked": Emitted(_D, ("stream", "group", "count"), "handled and done"),
    "effects.published": Emitted(
        _D, ("stream", "count"), "events appended as effects, of deliveries or a transaction"
    ),
    "transaction.committed": Emitted(_D, ("commands", "duration_s"), "state and events are in"),
    "delivery.duplicate": Emitted(
        _I, _ENTRY, "acked: another delivery of the event was handled (once=)"
    ),
    "delivery.skipped": Emitted(
        _D, ("stream", "group", "count"), "acked: of a type the handler did not ask for"
    ),
    "delivery.retried": Emitted(
        _W, (*_ENTRY, "delay_s", *_ERROR), "an attempt failed; parked until the next"
    ),
    "delivery.postponed": Emitted(
        _I, (*_ENTRY, "delay_s", "reason"), "parked without using up an attempt"
    ),
    "delivery.dead_lettered": Emitted(
        _E, (*_ENTRY, "reason", *_ERROR), "moved to the group's dead letters"
    ),
    "dead_letters.full": Emitted(
        _E,
        ("stream", "group", "count", "maxlen"),
        "dead_letter_maxlen is reached: parked instead; redrive or purge the dead letters",
    ),
    "delivery.moved": Emitted(
        _I, ("stream", "group", "count"), "parked entries of a filling stream, into the inbox"
    ),
    "inbox.full": Emitted(
        _E,
        ("stream", "group"),
        "so many parked entries were moved aside that the next ones hold up the stream again",
    ),
    "delivery.handed_back": Emitted(
        _I, ("stream", "group", "count"), "given up unstarted, for any worker to take"
    ),
    "delivery.taken": Emitted(
        _D, ("stream", "group", "count"), "parked entries whose time has come were taken"
    ),
    "delivery.reclaimed": Emitted(
        _W, ("stream", "group", "count", "owner"), "taken over from a dead worker"
    ),
    "delivery.recovered": Emitted(
        _W, ("stream", "group", "count"), "delivered to this worker but never seen; taken up now"
    ),
    "verdict.failed": Emitted(
        _W, ("stream", "group", "count", "error_type", "error"), "not taken yet; tried again"
    ),
    "verdict.void": Emitted(
        _E, ("stream", "group", "count"), "the group is gone; made again, it delivers what is left"
    ),
    "delivery.refused": Emitted(
        _W, ("stream", "group", "count", "verb"), "a verdict was too late: another worker owns it"
    ),
    "delivery.dropped": Emitted(
        _W, ("stream", "group", "count"), "not run: another worker took it meanwhile"
    ),
    "delivery.lost": Emitted(
        _E, ("stream", "group", "count", "entry_ids"), "pending, but its entry was trimmed by hand"
    ),
    "delivery.overrun": Emitted(
        _E,
        ("stream", "group", "count"),
        "not handled by the group and deleted for room (on_full=drop_oldest)",
    ),
    "handler.stuck": Emitted(
        _E, (*_ENTRY, "running_s"), "ignores its cancellation after timeout_s"
    ),
    "breaker.opened": Emitted(
        _E, ("group", "failures", "calls", "window_s"), "most calls fail: nothing starts but probes"
    ),
    "breaker.probed": Emitted(
        _I, ("group", "outcome"), "an event was tried while open: worked, failed or undecided"
    ),
    "breaker.closed": Emitted(_W, ("group", "open_s"), "a probe worked: all goes on"),
    "breaker.refunded": Emitted(
        _I,
        ("stream", "group", "count", "missed"),
        "events that got back the attempts they lost as it opened; missed: those taken meanwhile",
    ),
    "breaker.refund_failed": Emitted(
        _W, ("stream", "group", "count", "error_type", "error"), "attempts not given back yet"
    ),
    "once.failed": Emitted(
        _W,
        ("group", "error_type", "error"),
        "the server does not say what was handled (once=): all of the group wait, and ask again",
    ),
    "on_dead.failed": Emitted(
        _E,
        (*_ENTRY, *_ERROR),
        "on_dead raised, was cut off, or not called as the worker stopped; the dead letter stays",
    ),
    # looking back
    "history.gap": Emitted(
        _W,
        ("stream", "after", "first"),
        "what was read last is trimmed by now: entries between it and `first` may be missing",
    ),
    "replay.rewound": Emitted(
        _W,
        ("run", "topic", "to"),
        "the server knows less of the run than it said, or somebody else is at it: goes on there",
    ),
    "replay.failed": Emitted(
        _E,
        ("run", "topic", "to", "replayed", "error_type", "error"),
        "ended by an error; the checkpoint, if there is one, stands",
    ),
    "replay.started": Emitted(_I, ("run", "topic", "to"), "a replay reads from now on"),
    "replay.waits": Emitted(
        _W, ("run", "stream", "to"), "no room where it goes; said once until something is taken"
    ),
    "replay.retried": Emitted(
        _W, ("run", "stream", "error_type", "error"), "a batch is put again; what is there stays"
    ),
    "replay.unreadable": Emitted(
        _W,
        ("stream", "entry_id", "error_type", "error"),
        "left out: no event, or not to be decoded",
    ),
    "replay.finished": Emitted(
        _I,
        ("run", "topic", "to", "replayed", "unreadable", "duration_s"),
        "everything that was asked for is where it was to go",
    ),
    "dead_letters.redriven": Emitted(
        _I, ("run", "stream", "group", "count"), "back in the inbox of the handler that failed"
    ),
    "dead_letters.purged": Emitted(_I, ("stream", "group", "count"), "deleted, as was asked"),
    "dead_letters.unreadable": Emitted(
        _E,
        ("stream", "group", "error"),
        "left out of what was asked of all topics: the key holds another Redis type",
    ),
    "redrive.waits": Emitted(
        _W,
        ("run", "stream", "group", "count"),
        "no room in the inbox for these; said once until a call finds room for all it brings",
    ),
    "redrive.unserved": Emitted(
        _W,
        ("run", "stream", "group"),
        "nobody serves the group: its letters will wait in the inbox; said once a redrive",
    ),
    "redrive.retried": Emitted(
        _W,
        ("run", "stream", "group", "count", "error_type", "error"),
        "a call is made again, unchanged; what is done is done once",
    ),
    "tail.failed": Emitted(
        _W, ("error_type", "error"), "a read for tails failed; it is tried again from where it was"
    ),
    "tail.gap": Emitted(
        _W,
        ("stream", "after", "first"),
        "entries after this id may have been trimmed before a tail had read them",
    ),
    # workers, groups, streams
    "worker.started": Emitted(_I, ("worker", "server", "groups", "streams"), "reads from now on"),
    "worker.stopping": Emitted(_I, ("worker", "reason"), "reads no more, lets handlers finish"),
    "worker.stopped": Emitted(_I, ("worker", "handed_back", "cancelled"), "has drained"),
    "janitor.failed": Emitted(
        _W, ("worker", "error_type", "error"), "could not tidy up; tried again"
    ),
    "topics.failed": Emitted(
        _W, ("worker", "error_type", "error"), "could not look whether topics have changed"
    ),
    "lease.failed": Emitted(
        _W, ("worker", "error_type", "error"), "could not say that it lives, or renew; tried again"
    ),
    "sweep.failed": Emitted(
        _W, ("worker", "error_type", "error"), "could not look for due and orphaned entries"
    ),
    "worker.failed": Emitted(
        _E, ("worker", "part", "error_type", "error", "where"), "a part of the worker broke"
    ),
    "group.created": Emitted(_I, ("stream", "group"), "a new group, at its handler's start"),
    "group.recreated": Emitted(
        _E, ("stream", "group"), "the group had vanished: made again at the stream's beginning"
    ),
    "group.unserved": Emitted(
        _W,
        ("stream", "group", "share"),
        "at a worker's start: nobody serves this group; it pins this share of the stream's room",
    ),
    "group.pinning": Emitted(
        _E,
        ("stream", "group", "share"),
        "nobody serves this group, and it pins half of the room or more: serve it or delete it",
    ),
    # an operator at work
    "topic.marked": Emitted(_I, ("topic", "differences"), "what is recorded was changed"),
    "topic.trimmed": Emitted(_I, ("stream", "count"), "history that nobody needed was removed"),
    "group.moved": Emitted(
        _I, ("stream", "group", "before", "after"), "the group is given other entries next"
    ),
    "group.removed": Emitted(
        _I, ("stream", "group"), "deleted, with its inbox and its dead letters"
    ),
    "pending.released": Emitted(
        _I, ("group", "count"), "pending entries that any worker may take at once"
    ),
    "pending.given_up": Emitted(
        _I, ("group", "count"), "pending entries that were made dead letters by hand"
    ),
    "group.paused": Emitted(
        _W,
        ("worker", "topic", "group", "why"),
        "starts nothing more of it, by order of an operator; what runs goes on",
    ),
    "group.resumed": Emitted(_W, ("worker", "topic", "group"), "its pause is over: all goes on"),
    "pauses.failed": Emitted(
        _W, ("worker", "error_type", "error"), "the server does not say what is paused: as before"
    ),
    "stream.broken": Emitted(
        _E, ("stream", "group", "error"), "not read for now: its key holds another Redis type"
    ),
    "stream.mended": Emitted(_I, ("stream", "group"), "read again"),
    "consumer.forgotten": Emitted(
        _I, ("stream", "group", "consumer"), "a dead worker with nothing pending was removed"
    ),
    "topic.differs": Emitted(
        _W, ("topic", "differences"), "declared otherwise than recorded; what is recorded holds"
    ),
    "topic.recorded": Emitted(_I, ("topic", "partitions", "implicit"), "first use of a topic"),
    # connections
    "connection.lost": Emitted(
        _W, ("role", "error_type", "error"), "a connection ended; it is made again when needed"
    ),
    "connection.restored": Emitted(_I, ("role",), "a connection that was lost works again"),
    "process.restarted": Emitted(
        _E, ("pid", "exit_code", "delay_s"), "a worker process died and is started again"
    ),
}


class Telemetry:
    """Hands what is emitted to whoever attached."""

    __slots__ = ("_attached", "_by_name")

    def __init__(self) -> None:
        self._attached: list[tuple[str, Listener]] = []
        self._by_name: dict[str, tuple[Listener, ...]] = {}

    def attach(self, pattern: str, listener: Listener) -> None:
        """Call `listener` for every emitted name that `pattern` matches.

        pattern: a name of EVENTS, a family such as "delivery.*", or "*".
        Errors: DeclarationError when nothing of that name is ever emitted.
        """
        if not any(_matches(pattern, name) for name in EVENTS):
            raise DeclarationError(f"nothing named {pattern!r} is emitted; see telemetry.EVENTS")
        self._attached.append((pattern, listener))
        self._index()

    def detach(self, listener: Listener) -> None:
        """Stop calling `listener`; one that is not attached is no error."""
        self._attached = [(p, fn) for p, fn in self._attached if fn != listener]
        self._index()

    def emit(self, name: str, **fields: Any) -> None:
        """Tell the listeners of `name`. Costs two dict lookups when nobody listens.

        A warning or error that nobody listens to goes to the logger `bus`: what fails is never
        silent, also in a program that attached nothing.
        """
        listeners = self._by_name.get(name)
        if listeners is None:
            if EVENTS[name].level >= logging.WARNING:
                _say(name, fields)
            return
        for listener in listeners:
            try:
                listener(name, fields)
            except Exception:
                logging.getLogger("bus.telemetry").exception("listener for %s raised", name)

    def _index(self) -> None:
        by_name = {
            name: tuple(fn for p, fn in self._attached if _matches(p, name)) for name in EVENTS
        }
        self._by_name = {name: fns for name, fns in by_name.items() if fns}


def _say(name: str, fields: dict[str, Any]) -> None:
    said = {k: v for k, v in fields.items() if k != "error" or "where" not in fields}
    pairs = " ".join(f"{k}={v}" for k, v in said.items())
    logging.getLogger("bus").log(EVENTS[name].level, "%s %s", name, pairs)


def _matches(pattern: str, name: str) -> bool:
    return pattern in ("*", name) or (pattern.endswith(".*") and name.startswith(pattern[:-1]))
