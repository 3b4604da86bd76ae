"""The work every system does, and how it is measured: the same entries, the same counts."""

import random
import string
from pathlib import Path

from bus import Event

TOPIC = "bench"
STREAM = "bus:{bench:0}"
LANES = 100
STANDINGS = ("below", "keep", "pinned")  # where a stream stands that is published into
QUOTA_STREAM = "bus:{bench-quota:0}"
QUOTAS = ("quota", "quota-event")  # handlers with effects: a counter, and an event if it crosses
NODE = 100  # entries of a node of a stream: less is not trimmed while there is room


class DocumentCreated(Event, type="bench.document_created"):
    """About 250 bytes as JSON."""

    document_id: str
    dataset_id: str
    title: str
    tokens: int
    tags: list[str]


class QuotaExceeded(Event, type="bench.quota_exceeded", topic="bench-quota", key="quota"):
    """What a handler with effects publishes, seldom."""

    quota: str
    used: int


def quota_of(event: DocumentCreated) -> str:
    """Return which of a hundred quotas an event counts on."""
    return f"quota-{event.tokens % 100}"


def make_events(count: int, seed: int = 7) -> list[DocumentCreated]:
    """Return `count` distinct events, the same in every process."""
    rng = random.Random(seed)
    letters = string.ascii_lowercase + string.digits

    def word(length: int) -> str:
        return "".join(rng.choices(letters, k=length))

    return [
        DocumentCreated(
            document_id=word(32),
            dataset_id=word(32),
            title=word(60),
            tokens=rng.randrange(100_000),
            tags=[word(8), word(6), word(10)],
        )
        for _ in range(count)
    ]


def peak_rss_mb() -> float:
    """Return the largest resident size of this process so far, in MB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return float("nan")
