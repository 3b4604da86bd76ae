"""Whether anything was trimmed away between two reads, for the price of an XLEN.

A read from an entry on brings what lies beyond it, also when that entry and some that followed it
are gone by then. As long as the stream is longer than what was read, the entry is still there.
"""

from collections.abc import Mapping
from typing import NamedTuple

from bus.history.place import Place
from bus.streams.answers import RawEntry
from bus.streams.replies import Reply


class Proof(NamedTuple):
    """What is still to be shown: that `after` was there when so many entries from `first` came."""

    after: bytes
    first: bytes
    entries: int


class Proofs:
    """What is to be shown of each stream."""

    def __init__(self) -> None:
        self._open: dict[str, Proof] = {}

    @property
    def streams(self) -> list[str]:
        """The streams whose lengths would tell."""
        return list(self._open)

    def add(self, stream: str, place: Place, entries: list[RawEntry]) -> None:
        """Note what came after `place`. What was doubtful before is shown together with it."""
        before = self._open.get(stream)
        if before is not None:
            self._open[stream] = before._replace(entries=before.entries + len(entries))
        elif place.met:
            self._open[stream] = Proof(place.at, entries[0][0], len(entries))

    def pop(self, stream: str) -> Proof | None:
        """Take out what is to be shown of a stream: somebody has looked, or nobody cares."""
        return self._open.pop(stream, None)

    def short(self, lengths: Mapping[str, Reply]) -> list[str]:
        """Return the streams that are no longer than what was read from them."""
        return [s for s, proof in self._open.items() if _number(lengths.get(s)) <= proof.entries]

    def weigh(
        self, lengths: Mapping[str, Reply], came: Mapping[str, list[RawEntry]], full: int
    ) -> list[str]:
        """Drop what the lengths have shown, and return the streams that remain doubtful.

        came: what came since; it may have been there when the lengths were taken. `full` of a
        stream says no more than that there were others: it is shown when all were read, but not
        so late that it may be trimmed for other reasons.
        """
        doubtful = []
        for stream, length in lengths.items():
            proof = self._open.get(stream)
            if proof is None:
                continue
            later = len(came.get(stream, ()))
            beyond, long = proof.entries + later, _number(length)
            if later < full and long > beyond:
                del self._open[stream]
            elif long <= 2 * beyond:
                doubtful.append(stream)
        return doubtful


def _number(length: Reply) -> int:
    return length if isinstance(length, int) else 0
