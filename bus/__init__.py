"""Typed event bus on plain Redis Streams: at-least-once, retries and dead letters per handler.

    from bus import Bus, Event, Worker, event_handler

See README.md for the first steps and docs/guarantees.md for what is promised.
"""

from bus.backoff import Backoff
from bus.breaker import Breaker
from bus.bus import Bus
from bus.delivery import DeadLettered, Delivery
from bus.effects import Effects
from bus.envelope import Envelope
from bus.errors import (
    AlreadySettled,
    AuthenticationFailed,
    BusClosed,
    BusError,
    CheckpointError,
    DeclarationError,
    EffectNotAllowed,
    EffectsClosed,
    EffectsFailed,
    EventLoop,
    EventTooLarge,
    InvalidEffect,
    InvalidEvent,
    LetterGone,
    NoReplyYet,
    NotSupported,
    PermissionDenied,
    PublishError,
    PublishRefused,
    PublishTimeout,
    PublishUnknown,
    Reject,
    RetryLater,
    ServerError,
    ServerRefused,
    ServerUnreachable,
    ServerUnsuitable,
    StreamFull,
    TopicMismatch,
    Undecodable,
    UnknownEventType,
    UnknownGroup,
    UnknownTopic,
    WrongKeyType,
)
from bus.event import Event
from bus.handler import Handler, Registry, event_handler
from bus.history.backlog import Backlog
from bus.history.dead_letters import DeadLetters, Purged
from bus.history.letter import Letter
from bus.history.redrive import Redriven
from bus.history.replay import Replayed
from bus.history.snapshot import Snapshot
from bus.history.tail import Tail
from bus.history.wanted import Progress
from bus.publisher import Receipt
from bus.reply import Condition, Reply
from bus.topic import Topic
from bus.transaction import Transaction
from bus.upcast import upcast
from bus.worker.supervisor import Worker

__all__ = [
    "AlreadySettled",
    "AuthenticationFailed",
    "Backlog",
    "Backoff",
    "Breaker",
    "Bus",
    "BusClosed",
    "BusError",
    "CheckpointError",
    "Condition",
    "DeadLettered",
    "DeadLetters",
    "DeclarationError",
    "Delivery",
    "EffectNotAllowed",
    "Effects",
    "EffectsClosed",
    "EffectsFailed",
    "Envelope",
    "Event",
    "EventLoop",
    "EventTooLarge",
    "Handler",
    "InvalidEffect",
    "InvalidEvent",
    "Letter",
    "LetterGone",
    "NoReplyYet",
    "NotSupported",
    "PermissionDenied",
    "Progress",
    "PublishError",
    "PublishRefused",
    "PublishTimeout",
    "PublishUnknown",
    "Purged",
    "Receipt",
    "Redriven",
    "Registry",
    "Reject",
    "Replayed",
    "Reply",
    "RetryLater",
    "ServerError",
    "ServerRefused",
    "ServerUnreachable",
    "ServerUnsuitable",
    "Snapshot",
    "StreamFull",
    "Tail",
    "Topic",
    "TopicMismatch",
    "Transaction",
    "Undecodable",
    "UnknownEventType",
    "UnknownGroup",
    "UnknownTopic",
    "Worker",
    "WrongKeyType",
    "event_handler",
    "upcast",
]
