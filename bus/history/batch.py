"""What was read together: shared by all tails that it was read for."""

from collections.abc import Iterable, Mapping

from bus.envelope import Envelope, order
from bus.history.event_store import envelope_of
from bus.history.place import Gap
from bus.streams.answers import RawEntry

_SAMPLED = 8  # every so many entries are measured; those of one stream are much alike


class Batch:
    """Entries in the order of their ids, and what may be missing before them.

    entries: (stream, entry). starts: the id of the first of each stream.
    """

    __slots__ = ("_envelopes", "entries", "gaps", "size_bytes", "starts")

    def __init__(self, came: Mapping[str, list[RawEntry]], gaps: Iterable[Gap] = ()) -> None:
        self.entries = [(s, entry) for s, entries in came.items() for entry in entries]
        if len(came) > 1:
            self.entries.sort(key=lambda found: (order(found[1][0]), found[0]))
        self.starts = {s: entries[0][0] for s, entries in came.items() if entries}
        self.gaps = tuple(gaps)
        self.size_bytes = sum(map(size_of, came.values()))
        self._envelopes: list[Envelope | None] | None = None

    def envelope(self, n: int) -> Envelope:
        """Return the envelope of entry `n`; made once, however many ask."""
        if self._envelopes is None:
            self._envelopes = [None] * len(self.entries)
        envelope = self._envelopes[n]
        if envelope is None:
            envelope = self._envelopes[n] = envelope_of(*self.entries[n])
        return envelope


def size_of(entries: list[RawEntry]) -> int:
    """Return about how many bytes the entries take."""
    measured = [sum(map(len, fields)) + 64 for _, fields in entries[::_SAMPLED]]
    return sum(measured) * len(entries) // len(measured) if measured else 0
