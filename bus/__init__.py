"""Typed event bus on plain Redis Streams: at-least-once, retries and dead letters per handler.

    from bus import Bus, Event, Worker, event_handler

See README.md for the first steps and docs/guarantees.md for what is promised.
"""

# A name is imported when it is first asked for: neither `bus --help` nor a module that declares
# events needs to wait for a Redis client. Type checkers read `__init__.pyi`, and
# tests/test_public_names.py holds the two together.

import importlib
from typing import Any

_HOMES = {
    "backoff": "Backoff",
    "breaker": "Breaker",
    "bus": "Bus",
    "channels.channel": "Channel",
    "channels.tail": "ChannelTail",
    "delivery": "DeadLettered Delivery",
    "effects": "Effects",
    "envelope": "Envelope",
    "errors": (
        "AlreadySettled AuthenticationFailed BusClosed BusError ChannelEnded ChannelGap"
        " CheckpointError DeclarationError"
        " EffectNotAllowed EffectsClosed EffectsFailed EventLoop EventTooLarge HookRejected InUse"
        " InvalidEffect InvalidEvent LetterGone NoReplyYet NotPending NotRunning NotSupported"
        " PermissionDenied PublishError PublishRefused PublishTimeout PublishUnknown Reject"
        " RetryLater ServerError ServerRefused ServerUnreachable ServerUnsuitable StreamFull"
        " TopicMismatch Undecodable UnknownEventType UnknownGroup UnknownTopic WrongKeyType"
    ),
    "event": "Event",
    "handler": "Handler Registry event_handler",
    "history.backlog": "Backlog",
    "history.dead_letters": "DeadLetters Purged",
    "history.letter": "Letter",
    "history.redrive": "Redriven",
    "history.replay": "Replayed",
    "history.snapshot": "Snapshot",
    "history.tail": "Tail",
    "history.wanted": "Progress",
    "hooks": "Hook",
    "observers": "Observed Observer",
    "publisher": "Receipt",
    "raw": "raw_event",
    "reply": "Condition Reply",
    "topic": "Topic",
    "transaction": "Transaction",
    "upcasts": "upcast",
    "worker.supervisor": "Worker",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605 - it is a list of strings


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'bus' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"bus.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
