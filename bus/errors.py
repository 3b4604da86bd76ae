"""Every error this library raises, and what the caller can do about it.

BusError
├── DeclarationError          the program is wrong: an event, topic, handler, setting; fix it
│   ├── NotSupported          the thing asked for is not part of this release
│   ├── TopicMismatch         two processes declare one topic differently; make them agree
│   ├── UnknownTopic          nobody has declared or used a topic of that name
│   └── UnknownGroup          no handler with that group has been served on the topic
├── InvalidEvent              this event can never be published; nothing was sent
│   ├── EventTooLarge         its entry is above `max_event_bytes`; publish a reference to the data
│   └── EventLoop             handlers trigger each other for ever: the chain of causes is too long
├── InvalidEffect             this effect cannot be collected; none of the delivery's take place
│   ├── EffectNotAllowed      no such effect: only the listed commands may run with an ack
│   ├── EffectsClosed         collected too late, after the handler or the block had ended
│   └── NoReplyYet            a reply was used as a value before the server gave it
├── Undecodable               an entry's bytes are not the event its type says (reading side)
│   └── UnknownEventType      no class for this type and version is known to this process
├── ServerError               the server cannot be used as it is; the text names the remedy
│   ├── ServerUnreachable     nobody answers at the address
│   ├── AuthenticationFailed  wrong or missing user or password
│   ├── PermissionDenied      the user may not run a command that is needed
│   ├── ServerUnsuitable      too old, or it may evict streams
│   ├── ServerRefused         it answers and takes no writes now: see `.code`
│   └── WrongKeyType          a key that should be a stream holds something else
├── CheckpointError           a replay cannot go on from that file; the text says why
├── LetterGone                there is no such dead letter (any more): redriven or purged
├── NotPending                there is no such entry pending (any more): it was finished
├── InUse                     a group or consumer is at work: stop its workers first
├── AlreadySettled            a batch handler settles one delivery twice, or after its call ended
├── ChannelEnded              the channel has its end marker: nothing can be published any more
├── ChannelGap                entries of a channel were missed, or it is gone: see `.reason`
├── HookRejected              a hook said no, see `.reason`; nothing was done
├── NotRunning                the event loop that should do it does not run, or not here
├── BusClosed                 the bus was closed before; connect again
├── EffectsFailed             a transaction's command failed; see `.applied` for what stays
└── PublishError              a publish or a transaction did not end well
    ├── PublishTimeout        not published: it could not be sent in time
    │   └── PublishRefused    not published: the server answered and refused to the end, see `.code`
    ├── PublishUnknown        sent, and no answer came in time: it may have been published
    └── StreamFull            not published: no room, see `.group` for who needs what is there

`Reject` and `RetryLater` are not errors of the bus: a handler raises them to end its attempt.
"""

from typing import Literal


class BusError(Exception):
    """Root of all errors of this library."""


class DeclarationError(BusError):
    """An event class, topic, handler, pattern, name or setting is not valid."""


class NotSupported(DeclarationError):
    """The URL scheme or parameter is not part of this release."""


class TopicMismatch(DeclarationError):
    """The declared partition count of a topic contradicts the recorded one."""


class UnknownTopic(DeclarationError):
    """Nothing is recorded, declared or kept of the topic that was asked for."""


class UnknownGroup(DeclarationError):
    """The group that was asked for does not exist on any stream of the topic."""


class InvalidEvent(BusError):
    """The event cannot be encoded as its class declares; nothing was sent."""


class EventTooLarge(InvalidEvent):
    """The encoded event is above `max_event_bytes`; nothing was sent."""


class EventLoop(InvalidEvent):
    """The event is caused by an event that is caused by an event ..., more than 32 deep."""


class InvalidEffect(BusError):
    """The effect cannot be collected: a bad key, value or condition, or too many of them."""


class EffectNotAllowed(InvalidEffect, AttributeError):
    """Only a fixed list of commands can be an effect."""


class EffectsClosed(InvalidEffect):
    """The handler has returned, or the transaction is over: nothing more can be collected."""


class NoReplyYet(InvalidEffect):
    """The reply of an effect was used as a value, and the server has not given it."""


class EffectsFailed(BusError):
    """The server refused a command of a transaction.

    applied: the commands before it, which stay: Redis has no rollback. Empty when a key had the
    wrong type, since types are checked before the first write.
    """

    def __init__(self, text: str, applied: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.applied = applied


class Undecodable(BusError):
    """The bytes of an entry are not the event that its type field names."""


class UnknownEventType(Undecodable):
    """No event class for this type and version is known to this process."""


class ServerError(BusError):
    """The server cannot be used as it is configured."""


class ServerUnreachable(ServerError):
    """Nobody answers at the address."""


class AuthenticationFailed(ServerError):
    """The server refused the user or password."""


class PermissionDenied(ServerError):
    """The server's access list forbids a command that the bus needs."""


class ServerUnsuitable(ServerError):
    """The server is too old, or its memory policy may evict streams."""


class ServerRefused(ServerError):
    """The server answers and takes no writes now: it is full, a replica, loading, cannot save.

    code: why, as the server says it: OOM, READONLY, LOADING, MISCONF or another of its codes.
    """

    def __init__(self, text: str, code: str) -> None:
        super().__init__(text)
        self.code = code


class WrongKeyType(ServerError):
    """A key that should hold a stream holds another type; it is never deleted by the bus."""


class CheckpointError(BusError):
    """The checkpoint of a replay is damaged, is of another replay, or is no longer known."""


class LetterGone(BusError):
    """The dead letter is not there, or no longer: it was redriven or purged meanwhile."""


class NotPending(BusError):
    """The entry is not pending for the group, or no longer: it was finished meanwhile."""


class InUse(BusError):
    """The group or consumer is at work: its workers are to be stopped first."""


class AlreadySettled(BusError):
    """A delivery of a batch was settled singly before, or the call it belonged to has ended."""


class ChannelEnded(BusError):
    """The channel was ended: nothing can be published to it any more; take another name."""


class ChannelGap(BusError):
    """A reader of a channel has missed entries, or may have.

    reason: "trimmed": those between `after` and `first` were dropped, at the channel's cap;
    "restarted": the channel is another than the one `after` is from, or has lost its end, and is
    read from its beginning, or on from there; "gone": it has expired, without an end.
    after: id of the entry behind which they are missing, None at the beginning; a reader that had
    waited may have been given some that follow. first: of the oldest entry there is, None for none.
    Iterating over the same tail goes on, but after "gone".
    """

    def __init__(
        self,
        text: str,
        reason: Literal["trimmed", "restarted", "gone"],
        after: str | None,
        first: str | None,
    ) -> None:
        super().__init__(text)
        self.reason: Literal["trimmed", "restarted", "gone"] = reason
        self.after = after
        self.first = first


class HookRejected(BusError):
    """Raised by a hook: no. It reaches whoever asked; for `hook.handle` it is a dead letter.

    reason: what the hook said. point, hook: where it was asked, and its name; "" before.
    """

    def __init__(self, reason: object) -> None:
        super().__init__(reason)
        self.reason = str(reason)
        self.point = ""
        self.hook = ""

    def __str__(self) -> str:
        return f"{self.point}: {self.hook} said no: {self.reason}" if self.point else self.reason


class NotRunning(BusError):
    """The bus has no running event loop yet, or any more, or its loop runs in another thread."""


class BusClosed(BusError):
    """The bus, or the connection asked for, has been closed."""


class PublishError(BusError):
    """A publish or a transaction did not end well."""


class PublishTimeout(PublishError):
    """Certainly not published, or not committed, within `publish_timeout_s`."""


class PublishRefused(PublishTimeout):
    """The server answered and would not take the event within `publish_timeout_s`.

    code: why, as the server says it: OOM (out of memory), READONLY (a replica, or a demoted
    primary), MISCONF (it cannot save to disk), LOADING, BUSY, NOREPLICAS or another of its codes.
    """

    def __init__(self, text: str, code: str) -> None:
        super().__init__(text)
        self.code = code


class PublishUnknown(PublishError):
    """Sent, and whether it was published or committed is not known."""


class StreamFull(PublishError):
    """The stream is at its `maxlen` and nothing of it may go; the event was not published.

    stream: its key. group: the group that needs the oldest entry, "" if none does. pending,
    undelivered: its backlog as the server knows it, None where it does not.
    """

    def __init__(
        self,
        text: str,
        stream: str = "",
        group: str = "",
        pending: int | None = None,
        undelivered: int | None = None,
    ) -> None:
        super().__init__(text)
        self.stream = stream
        self.group = group
        self.pending = pending
        self.undelivered = undelivered


def words_of(error: BaseException) -> str:
    """Return an exception's text, whatever its class does instead of giving it."""
    try:
        return str(error)
    except BaseException as broken:
        return f"(its text cannot be had: {type(broken).__name__})"


class Reject(Exception):
    """Raised by a handler: this delivery can never succeed, dead-letter it now."""

    def __init__(self, reason: object) -> None:
        super().__init__(reason)
        self.reason = str(reason)


class RetryLater(Exception):
    """Raised by a handler: not now; park the delivery, using up no attempt.

    `delay_s` is in seconds, 0 or more; less than 0.1 waits 0.1.
    """

    def __init__(self, delay_s: float) -> None:
        if not 0 <= delay_s <= 365 * 86_400:
            raise ValueError(f"RetryLater takes 0 to 31,536,000 seconds, not {delay_s!r}")
        super().__init__(f"retry in {delay_s} s")
        self.delay_s = delay_s
