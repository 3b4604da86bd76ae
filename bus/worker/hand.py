"""What a worker holds of one stream for one group, from delivery until the verdict is applied."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bus.config import VERDICTS_PER_CALL
from bus.delivery import DeadLetter, Delivery, HandBack, Origin, Park
from bus.streams.codec import locate
from bus.telemetry import Telemetry


@dataclass(slots=True, eq=False)
class Hand(Origin):
    """The origin of its deliveries, and their verdicts on the way to the server.

    held: what waits, runs, or has a verdict with a body that is not yet on the server; all of it
        is renewed.
    acks, acking: ids that were handled and are not yet acked on the server, waiting and on their
        way; their bodies are gone already.
    Nothing in any of them is taken up a second time by recovery or reclaim.
    """

    held: dict[bytes, Delivery[Any]] = field(default_factory=dict)
    acks: list[bytes] = field(default_factory=list)
    acking: list[bytes] = field(default_factory=list)
    skipped: int = 0
    parks: list[tuple[Delivery[Any], Park | HandBack]] = field(default_factory=list)
    dead: list[tuple[Delivery[Any], DeadLetter]] = field(default_factory=list)

    @property
    def known(self) -> list[bytes]:
        """The ids of everything in hand."""
        return [*self.held, *self.acks, *self.acking]

    @property
    def has_verdicts(self) -> bool:
        """Whether anything waits to be brought to the server."""
        return bool(self.acks or self.parks or self.dead)


def names_of(delivery: Delivery[Any]) -> dict[str, Any]:
    """Return what telemetry says of a delivery; works for entries that cannot be decoded."""
    located = locate(delivery.fields)
    return {
        "stream": delivery.origin.stream,
        "group": delivery.origin.group,
        "entry_id": delivery.entry_id.decode(),
        "event_id": (located.id or b"").decode(errors="replace")[:100],
        "event_type": (located.type or b"").decode(errors="replace")[:100],
        "attempt": delivery.attempt,
    }


def tell_lost(telemetry: Telemetry, hand: Hand, ids: Sequence[bytes]) -> None:
    """Tell that pending entries are gone: trimmed or deleted by hand."""
    telemetry.emit(
        "delivery.lost",
        stream=hand.stream,
        group=hand.group,
        count=len(ids),
        entry_ids=[i.decode() for i in ids[:20]],
    )


def chunks(items: list[Any], size: int = VERDICTS_PER_CALL) -> Iterable[list[Any]]:
    """Cut `items` into lists of at most `size`."""
    return (items[i : i + size] for i in range(0, len(items), size))
