"""Every default of the library, each in one place with its unit and its reason."""

import re
from datetime import timedelta

from bus.errors import DeclarationError

# --- publishing
MAX_EVENT_BYTES = 256 * 1024  # an event is news, not the document: larger data belongs elsewhere
PUBLISH_TIMEOUT_S = 30.0  # long enough for a failover, short enough for a caller to be told
ANSWER_S = 0.1  # beyond its timeout a publish waits for an answer that is on its way
PRODUCER_MEMORY_S = 600  # how long the server remembers a publisher's last batches
BATCH_EVENTS = 500  # events one append takes; beyond it the server gains nothing and others wait
BATCH_BYTES = 1024 * 1024  # the same bound for large events
FOLLOW_EVENTS = 16  # from so many on, a second append leaves behind one that is on its way
UNIT_EVENTS = 5_000  # the largest atomic publish_many; the server is busy for about 10 ms
UNIT_BYTES = 8 * 1024 * 1024

# --- channels
CHANNEL_TTL = timedelta(hours=1)  # who comes back to a page within that finds its run whole
CHANNEL_TTL_LEAST = timedelta(seconds=1)  # less would be over before a reader has reconnected
CHANNEL_TTL_MOST = timedelta(days=30)
CHANNEL_MAXLEN = 10_000  # the tokens of a long run, 1-2 MB; what is to stay belongs into a topic

# --- how long a stream may grow
MAXLEN = 1_000_000  # about 300 MB of 250-byte events; a day of 10 a second
MAXLEN_MAX = 1_000_000_000_000
KEEP_SHARE = 10  # keep is maxlen / 10 unless said otherwise: the rest is for slow groups
SLACK = 1_000  # what a stream may stand above keep before an append trims...
SLACK_SHARE = 10  # ...at most a tenth of the room, so that small streams stand at keep, too
RESERVE = 1_000  # entries above maxlen for what handlers publish, at least...
RESERVE_SHARE = 20  # ...a twentieth of maxlen, if that is more
ROOM_WAIT_S = 0.05  # longest pause between two looks for room: publishers resume within 100 ms
OVERRUN_TOLD_S = 1.0  # drop_oldest deletes with every append; it is told no more often than this
FULL_SHARE = 0.8  # of the room between keep and maxlen: then parked entries are moved aside
UNSERVED_SHARE = 0.5  # of the room pinned by a group that nobody serves: an alert
PAUSES_S = 1.0  # how soon a worker notices that a group is paused, or no longer
PRESSURE_S = 1.0  # how soon a worker notices that a stream is filling up
MOVED_PER_CALL = 100  # parked entries moved aside by one script
DEAD_LETTERS_FULL_PARK_S = 60.0  # what cannot be dead-lettered for want of room is tried again
NOT_PUBLISHED_PARK_S = 1.0  # a delivery whose publish the server would not take comes again

# --- in this process
OBSERVER_MAXLEN = 1_000  # events an observer may be behind before it is told of no more than these
OBSERVER_TOLD_S = 1.0  # drops are told no more often than this
OBSERVER_GRACE_S = 1.0  # what observers get at the bus's close to catch up

# --- connections
CONNECT_TIMEOUT_S = 5.0
REPLY_TIMEOUT_S = 5.0  # a command without BLOCK that takes longer: the connection is given up
SHARED_READERS_FROM = 10  # handlers of one process; from so many on they share a doorbell
BLOCK_MS = 2_000  # the longest a read waits on the server, hence the slowest stop without UNBLOCK

# --- handling
MAX_ATTEMPTS = 5
CONCURRENCY = 16
VISIBILITY_S = 30.0  # a delivery nobody renewed for this long belongs to whoever takes it
LEASE_S = 15.0  # a worker not heard of for this long is dead
GRACE_S = 20.0  # what a handler gets to finish at shutdown; below the usual 30 s of orchestrators
READ_COUNT = 500  # entries per read; the measured optimum (250-500)
READ_BYTES = 1024 * 1024  # aim per read, by the running mean of entry sizes
IN_HAND_S = 0.020  # read ahead while what is in hand is less work than this
WAITED_S = 1.0  # what waited longer without starting is handed back
TURN_S = 0.005  # what runs on and on lets others run at least this often
SLOT_TURN_S = 0.0005  # slots do so sooner: what they have done is sent, and the server works, too
SLOT_WAKE_S = 20e-6  # ... unless they are so many that waking them would take most of the time
BATCH_MOST = 5_000  # deliveries per call of a batch handler, as many as one publish_many takes
BATCH_WAIT_MS = 50  # what a call waits to be fuller: what a person does not notice
BATCH_WAIT_MOST_MS = 10_000  # what waits is in this worker's hand, and nobody else's
MAX_DECODE_BYTES = 8 * 1024 * 1024  # no publisher of ours writes more; tiny msgpack can swell x65
RETRY_LATER_MIN_S = 0.1  # RetryLater uses up no attempt: at 0 it would spin for ever
UNKNOWN_TYPE_PARK_S = 300.0  # an unknown type waits for the deployment that brings it...
UNKNOWN_TYPE_MAX_AGE_S = 86_400.0  # ...for a day after it was published
SWEEP_S = 1.0  # safety net for retries and crashed workers
SWEEP_LEASE_MS = 2_000
JANITOR_S = 30.0
# A consumer that keeps no lease serves its group if it was heard of within this time: far above the
# usual BLOCK of a reader, and soon enough for a group that nobody reads any more.
HEARD_OF_MS = 60_000
TOPICS_S = 5.0  # how soon new partitions are read, and a lost topic record is written again
VERDICTS_PER_CALL = 500  # bounds how long one script keeps the server busy
PROMPT_RETRIES = 10_000  # local timers per handler; the sweep takes what is above

# --- looking back
FIRST_PAGE = 32  # entries: most who look want few, and how large they are is not known yet
LOOK_PATIENCE_S = 15.0  # what only reads is asked again for so long: a few replies that hang
INSPECT_PATIENCE_S = 2.0  # for looks that are taken again and again, and stale soon
PAGE_LEAST_BYTES = 128 * 1024  # aim per page of one partition of many; else READ_BYTES are shared
TAIL_ENTRIES = 2_000  # may lie unread before a tail, four full reads; then it reads by itself...
TAIL_BYTES = 2 * 1024 * 1024  # ...the same bound for large events

THROTTLE_S = 0.1  # a rate is kept in steps of this length: even, and not one by one
INBOX_SHARE = (
    2  # replays fill an inbox to half of what may be moved there: the rest is for the live
)
CROWDED_SHARE = 0.9  # of maxmemory: above it replays wait, so that publishers still can
CROWDED_LOOK_S = 1.0
REPLAY_MEMORY_S = 30 * 86_400  # a replay that was killed can be gone on with for so long
REPLAY_OVER_S = 86_400  # ...and one that is over is remembered for so long
REPLAY_PATIENCE_S = 60.0  # for a server that is away or refuses; then the checkpoint stands
CHECKPOINT_S = 0.5  # how often it is written: cheap beside what a batch takes
REDRIVE_PATIENCE_S = 60.0  # likewise; well below PRODUCER_MEMORY_S, so that a repeat is known
REDRIVEN_PER_CALL = 100  # dead letters, or 1 MiB of them: 1-2.5 ms of server
REDRIVEN_VALUES = 7_000  # names and values of one: a script can pass on about 8,000
PURGED_PER_CALL = 500
LETTERS_PER_LOOK = 50  # dead letters fetched by id at one time; they carry bodies and tracebacks
PROGRESS_S = 0.2
SAMPLE = 10  # envelopes that a dry run shows
INBOX_WAIT_LEAST_S = 0.01  # between two looks for room in an inbox...
INBOX_WAIT_MOST_S = 1.0  # ...longer and longer: its handler may take hours

# --- effects: they run in one script, during which the server does nothing else
EFFECTS = 1_000  # commands of one delivery or transaction, 2-4 ms of server
EFFECT_BYTES = 1024 * 1024
EFFECT_VALUES = 4_000  # of one command: Lua passes on about 8,000 at a time
EFFECTS_VALUES = 20_000  # of all commands: about 50 ms of server at worst, for sorted sets
EFFECTS_PER_CALL = 2_000  # commands of all deliveries that share a script call...
COMMITS_PER_CALL = 200  # ...and deliveries
ONCE_LEAST = timedelta(seconds=1)  # a publisher's own repeats take longer to come than that
ONCE_MOST = timedelta(days=366)
ONCE_BUSY_PARK_S = 5.0  # how long a second delivery of an event waits for the first one's end
ONCE_CLAIM_S = 86_400  # who may handle an event is noted for so long, also if it takes its time
CAUSATION_DEPTH = 32  # events that cause events that cause events: more is a loop

# --- the breaker: an outage of what a handler calls kills no event
BREAKER_FAILURE_RATIO = 0.5  # poison is a small share of the calls, an outage nearly all of them
BREAKER_WINDOW_S = 10.0  # long enough for min_calls of a slow handler; dead letters wait as long
BREAKER_MIN_CALLS = 20  # below the first calls of 16 slots and their retries; above a bad streak
BREAKER_PROBE_S = 5.0  # how late an outage's end is noticed, and how little it is burdened
BREAKER_MEMORY = 10_000  # failures remembered to be refunded, and dead letters held, per handler

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def checked_name(name: object, what: str) -> str:
    """Return `name` if it may stand in a Redis key, else raise DeclarationError.

    Topic, group and worker names: 1 to 100 of A-Z a-z 0-9 . _ - , the first a letter or digit.
    Braces, colons and spaces would break hash tags, access lists and log lines.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise DeclarationError(
            f"{what} {name!r} is not valid: 1 to 100 letters, digits, '.', '_' or '-',"
            " starting with a letter or digit"
        )
    return name


def checked_number(
    value: float, what: str, low: float, high: float, *, whole: bool = False
) -> float:
    """Return `value` if it is a number in [low, high], else raise DeclarationError."""
    wrong_type = isinstance(value, bool) or not isinstance(value, int if whole else (int, float))
    if wrong_type or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise DeclarationError(f"{what} must be {kind} from {low:g} to {high:g}, not {value!r}")
    return value
