"""Letters to look at: put there by hand, as the settler and the scripts write them."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import TYPE_CHECKING, Any

from bus import Event, Letter, Topic, upcast
from bus.streams import keys
from tests.eyes import eyes_of

if TYPE_CHECKING:
    from bus import Bus

TOPIC = Topic("mail", partitions=2)
TIGHT = Topic("mail", partitions=2, maxlen=40, keep=20)  # ten entries of an inbox are for redrives
STREAM, OTHER = "bus:{mail:0}", "bus:{mail:1}"
DEAD, INBOX = f"{STREAM}:dead:index", f"{STREAM}:inbox:index"
REASONS = ("failed", "rejected", "undecodable", "newer-version", "crashed", "effects-failed")


class Posted(Event, type="mail.posted", key="box"):
    box: str
    n: int = 0
    weight: float = 1.0


class Stamped(Event, type="mail.stamped", encoding="msgpack"):
    n: int
    seal: bytes = b""


class Sorted(Event, type="mail.sorted", version=3, rename="camel"):
    shelf_name: str
    pieces: int
    since: datetime | None = None


@upcast(Sorted, from_version=1)
def name_becomes_shelf(data: dict[str, Any]) -> dict[str, Any]:
    data["shelf"] = data.pop("name")
    return data


@upcast(Sorted, from_version=2)
def shelf_becomes_shelf_name(data: dict[str, Any]) -> dict[str, Any]:
    data["shelfName"] = data.pop("shelf")
    return data


class Weighed(Event, type="mail.weighed"):
    grams: int
    card: str = ""

    def __post_init__(self) -> None:
        if self.grams < 0:
            raise ValueError(f"less than nothing, paid with {self.card}")
        assert self.grams < 1_000, "too heavy"


class Padded(Event, type="mail.padded"):
    text: str


def box_of(partition: int) -> str:
    """A key that belongs to a partition of the topic."""
    return next(f"b{n}" for n in range(99) if keys.partition_of(f"b{n}", 2) == partition)


def own(n: int, **fields: Any) -> dict[Any, Any]:
    """The fields of an event."""
    data = json.dumps({"box": box_of(0), "n": n})
    return {"id": f"e{n}", "type": "mail.posted", "data": data, "partitionkey": box_of(0), **fields}


def why(reason: str = "failed", error: str = "ValueError: no", **fields: Any) -> dict[Any, Any]:
    """What is appended to them, as the settler and the scripts do."""
    return {
        "deadreason": reason,
        "deaderror": error,
        "deadtraceback": "line 1\nline 2",
        "deadattempts": "5",
        "deadentry": "1700000000000-7",
        **fields,
        "deadtime": "1763629200000",
    }


async def prepare(bus: Bus) -> None:
    """Record the topic, and make the group, as a worker that has served the handler did."""
    await bus.topics.record("mail")
    for stream in (STREAM, OTHER):
        await eyes_of(bus).xgroup_create(stream, "index", "0", mkstream=True)


async def put(
    bus: Bus,
    fields: dict[Any, Any],
    entry_id: str = "*",
    stream: str = STREAM,
    group: str = "index",
) -> str:
    """Put a letter there by hand; return its id."""
    key = f"{stream}:dead:{group}"
    made = (await eyes_of(bus).xadd(key, fields, id=entry_id)).decode()
    return f"{keys.tag_of(stream)}/{made}"


async def bury(bus: Bus, *ns: int, stream: str = STREAM, **fields: Any) -> list[str]:
    """Letters of good events that failed."""
    return [await put(bus, own(n) | why(**fields), stream=stream) for n in ns]


async def dead(bus: Bus, key: str = DEAD) -> list[dict[bytes, bytes]]:
    return [fields for _, fields in await eyes_of(bus).xrange(key)]


async def ns_of(bus: Bus, key: str) -> list[int]:
    """The n of each entry, in order."""
    return [json.loads(fields[b"data"])["n"] for _, fields in await eyes_of(bus).xrange(key)]


async def found(letters: Any) -> list[Letter]:
    return [letter async for letter in letters]


def shown(value: Any) -> str:
    """What a case is called, in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))[:60]
