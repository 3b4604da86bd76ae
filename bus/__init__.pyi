from bus.backoff import Backoff
from bus.breaker import Breaker
from bus.bus import Bus
from bus.channels.channel import Channel
from bus.channels.tail import ChannelTail
from bus.delivery import DeadLettered, Delivery
from bus.effects import Effects
from bus.envelope import Envelope
from bus.errors import (
    AlreadySettled,
    AuthenticationFailed,
    BusClosed,
    BusError,
    ChannelEnded,
    ChannelGap,
    CheckpointError,
    DeclarationError,
    EffectNotAllowed,
    EffectsClosed,
    EffectsFailed,
    EventLoop,
    EventTooLarge,
    HookRejected,
    InUse,
    InvalidEffect,
    InvalidEvent,
    LetterGone,
    NoReplyYet,
    NotPending,
    NotRunning,
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
from bus.hooks import Hook
from bus.observers import Observed, Observer
from bus.publisher import Receipt
from bus.raw import raw_event
from bus.reply import Condition, Reply
from bus.topic import Topic
from bus.transaction import Transaction
from bus.upcasts import upcast
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
    "Channel",
    "ChannelEnded",
    "ChannelGap",
    "ChannelTail",
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
    "Hook",
    "HookRejected",
    "InUse",
    "InvalidEffect",
    "InvalidEvent",
    "Letter",
    "LetterGone",
    "NoReplyYet",
    "NotPending",
    "NotRunning",
    "NotSupported",
    "Observed",
    "Observer",
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
    "raw_event",
    "upcast",
]
