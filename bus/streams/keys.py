"""Every Redis key and consumer name the bus makes. No other file builds one.

    bus:topics                          hash: topic -> JSON of what was recorded
    bus:paused                          hash: topic:group -> JSON of until when, and why
    bus:{document:0}                    stream: partition 0 of topic `document`
    bus:{document:0}:dead:<group>       stream: the group's dead letters
    bus:{document:0}:inbox:<group>      stream: entries for that one group, deleted when acked
    bus:{document:0}:lease:<consumer>   string, expires: that worker is alive
    bus:{document:0}:overrun            hash: group -> entries dropped that it had not handled
    bus:{document:0}:workers            set: consumers that keep a lease
    bus:{document:0}:sweep:<crc32>      string, expires: who sweeps for a set of groups
    bus:{document:0}:chore:<name>       string, expires: whose turn that chore is
    bus:{document:0}:pub:<publisher>    string, expires: a publisher's last two batches
    bus:{document:0}:once:<group>:<run>:<type>:<id>
                                        string, expires: an event was handled, or which entry of
                                        it may be; run: of a replay or redrive, else empty
    bus:{document:0}:replay:<run>       string, expires: how far a replay of it has come
    bus:{document:0}:redrive:<run>      string, expires: the last call of a redrive, and its answer
    bus:channel:{run-42}                stream, expires: the channel `run-42`
    bus:tx:<publisher>:<n>              string, expires: its last transaction but those under way;
                                        on a Cluster `bus:{<tag>}:tx:...`, beside what it touches

Everything of a partition has the hash tag `{topic:partition}`, so one script may touch it all.
A group's inbox is read like its stream and shares the stream's leases, turns and dead letters, so
the functions below take the key of either.
"""

from collections.abc import Iterable
from hashlib import blake2b
from zlib import crc32

from redis.crc import key_slot

OWN = "bus:"  # how every key of the bus begins, and no other should
TOPICS = "bus:topics"
PAUSED = "bus:paused"
PROBE = "bus:probe"
LANE = b"parked:"
_MOST_DIGITS = 15  # of a time in ms; the year 33658
_LONGEST_PART = 100  # bytes of what others have named


def stream(topic: str, partition: int) -> str:
    """Return the key of one partition of `topic`."""
    return f"bus:{{{topic}:{partition}}}"


def topic_of(stream_key: str) -> str:
    """Return the topic of the key of a partition, or of anything of it."""
    return stream_key.partition("{")[2].partition("}")[0].rpartition(":")[0]


def home(stream_key: str) -> str:
    """Return the key of the partition's own stream for the key of it, or of an inbox there."""
    return stream_key.partition("}")[0] + "}"


def inbox(stream_key: str, group: str) -> str:
    """Return the key of the private stream of `group` beside one stream."""
    return f"{home(stream_key)}:inbox:{group}"


def is_inbox(stream_key: str) -> bool:
    """Return whether the key is that of an inbox. Only a partition's own stream ends with `}`."""
    return not stream_key.endswith("}")


def dead(stream_key: str, group: str) -> str:
    """Return the key of the dead letters of `group` for one stream."""
    return f"{home(stream_key)}:dead:{group}"


def lease(stream_key: str, consumer: str | bytes) -> bytes:
    """Return the key that exists while the worker `consumer` is alive.

    As bytes, since consumers of other languages may have any name.
    """
    name = consumer if isinstance(consumer, bytes) else consumer.encode()
    return f"{home(stream_key)}:lease:".encode() + name


def workers(stream_key: str) -> str:
    """Return the key of the set of consumers that keep a lease on the stream."""
    return f"{home(stream_key)}:workers"


def sweep(stream_key: str, groups: Iterable[str]) -> str:
    """Return the key of the sweep lease shared by processes that serve the same groups."""
    return f"{home(stream_key)}:sweep:{crc32(','.join(sorted(groups)).encode()):08x}"


def chore(stream_key: str, name: str) -> str:
    """Return the key of the lease on one of a partition's chores: `room` or `retention`."""
    return f"{home(stream_key)}:chore:{name}"


def overrun(stream_key: str) -> str:
    """Return the key of the counts of what `on_full="drop_oldest"` took from groups unhandled."""
    return f"{home(stream_key)}:overrun"


def once(stream_key: str, group: str, run: bytes, event_type: bytes, event_id: bytes) -> str:
    """Return the key of the mark that `group` has handled an event; `run`: of a replay, or b"".

    What is long, or is no text, has its hash there, and what could be taken for something else.
    """
    parts = [_short(run, ":#"), _short(event_type, ":#"), _short(event_id, "#")]
    return f"{home(stream_key)}:once:{group}:{':'.join(parts)}"


def _short(part: bytes, reserved: str) -> str:
    """Return what stands for `part` in a key; `reserved`: characters that it must not have."""
    try:
        text = part.decode()
    except UnicodeDecodeError:
        text = None
    if text is not None and len(part) <= _LONGEST_PART and not any(c in text for c in reserved):
        return text
    return "#" + blake2b(part, digest_size=16).hexdigest()


def producer(stream_key: str, publisher: str) -> str:
    """Return the key under which the server remembers a publisher's last two batches."""
    return f"{stream_key}:pub:{publisher}"


def replay(stream_key: str, run: str) -> str:
    """Return the key under which the server remembers how far a replay of one stream has come."""
    return f"{home(stream_key)}:replay:{run}"


def redrive(stream_key: str, run: str) -> str:
    """Return the key under which the server remembers the last call of a redrive."""
    return f"{home(stream_key)}:redrive:{run}"


def channel(name: str) -> str:
    """Return the key of a channel. It belongs to no topic, and has no others beside it."""
    return f"bus:channel:{{{name}}}"


def channel_probe(channel_key: str) -> str:
    """Return a key that never exists, by which a script asks whether anything may be added."""
    return f"{channel_key}:probe"


def transaction(publisher: str, ticket: int, tag: str | None) -> str:
    """Return the key under which the server remembers a transaction.

    tag: on a Cluster that of what it touches, see `tag_of`.
    """
    place = "bus:tx:" if tag is None else f"bus:{{{tag}}}:tx:"
    return f"{place}{publisher}:{ticket}"


def tag_of(key: str) -> str:
    """Return the part of a key that decides its slot on a Cluster: what is in its first braces."""
    inner, closed, _ = key.partition("{")[2].partition("}")
    return inner if inner and closed else key


def slot_of(key: str) -> int:
    """Return the slot of a key on a Cluster."""
    return key_slot(key.encode())


def wire(name: str) -> bytes:
    """Return a group's name, or a key made of one, as the server has it.

    Others may have given it any bytes.
    """
    return name.encode("utf-8", "surrogateescape")


def text(group: bytes) -> str:
    """Return a group's name as text; the opposite of `wire`."""
    return group.decode("utf-8", "surrogateescape")


def partition_of(key: str, partitions: int) -> int:
    """Return the partition of `key`: CRC32 of its UTF-8, the same in every process and language."""
    return crc32(key.encode()) % partitions if partitions > 1 else 0


# Where commit.lua leaves what had a part of its effects, if it cannot be made a dead letter.
HALF_DONE = b"parked:999999999999999"


def lane_due_ms(consumer: bytes) -> int | None:
    """Return the server time in ms at which a lane is due, None if `consumer` is a worker."""
    digits = consumer[len(LANE) :]
    is_lane = consumer.startswith(LANE) and digits.isdigit() and len(digits) <= _MOST_DIGITS
    return int(digits) if is_lane else None
