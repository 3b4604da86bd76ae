"""Typed event bus on plain Redis Streams: at-least-once, retries and dead letters per handler.

    from bus import Bus, Event, Worker, event_handler

See README.md for the first steps and docs/guarantees.md for what is promised.
"""

from bus.backoff import Backoff
from bus.breaker import Breaker
from bus.bus import Bus
from bus.delivery import DeadLettered, Delivery, Envelope
from bus.errors import (
    AuthenticationFailed,
    BusClosed,
    BusError,
    DeclarationError,
    EventTooLarge,
    InvalidEvent,
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
    WrongKeyType,
)
from bus.event import Event
from bus.handler import Handler, Registry, event_handler
from bus.history.inspector import Backlog
from bus.publisher import Receipt
from bus.topic import Topic
from bus.worker.supervisor import Worker

__all__ = [
    "AuthenticationFailed",
    "Backlog",
    "Backoff",
    "Breaker",
    "Bus",
    "BusClosed",
    "BusError",
    "DeadLettered",
    "DeclarationError",
    "Delivery",
    "Envelope",
    "Event",
    "EventTooLarge",
    "Handler",
    "InvalidEvent",
    "NotSupported",
    "PermissionDenied",
    "PublishError",
    "PublishRefused",
    "PublishTimeout",
    "PublishUnknown",
    "Receipt",
    "Registry",
    "Reject",
    "RetryLater",
    "ServerError",
    "ServerRefused",
    "ServerUnreachable",
    "ServerUnsuitable",
    "StreamFull",
    "Topic",
    "TopicMismatch",
    "Undecodable",
    "UnknownEventType",
    "Worker",
    "WrongKeyType",
    "event_handler",
]
